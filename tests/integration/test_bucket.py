"""The whole pipeline with its store in a bucket."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.registry.mlflow_registry import open_registry
from tests.integration.harness import Home, gone
from tests.storage.servers import KEY, SECRET, client_of, rclone

STORE = "s3://forge-store/nightly"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home whose store is a bucket."""
    with rclone(tmp_path) as server:
        client_of(server).make_bucket("forge-store")
        settings = {
            "FORGE_STORE": STORE,
            "FORGE_S3_ENDPOINT": server,
            "FORGE_S3_ACCESS_KEY": KEY,
            "FORGE_S3_SECRET_KEY": SECRET,
        }
        home = Home(tmp_path / "home", settings)
        try:
            yield home
        finally:
            home.stop()
            assert gone(home.processes())


@pytest.mark.long
def test_model_is_trained_and_served_from_a_bucket(home: Home) -> None:
    status, output = home.run()
    assert status == 0, output
    first, server = home.facts(), home.served()
    (version,) = open_registry(home.settings).search_model_versions("name = 'dates'")
    assert version.source == f"{STORE}/models/dates/sha256-{first['digest']}"
    assert not (home.settings.home / "store").exists()
    assert SECRET not in output

    shutil.rmtree(home.settings.home / "copies")
    status, output = home.run()
    assert status == 0, output
    facts = home.facts()
    assert facts["cached"] == "preprocess_data, train_model, evaluate_model"
    assert (facts["version"], facts["digest"]) == (first["version"], first["digest"])
    assert home.served() == server, "the server was not restarted"
