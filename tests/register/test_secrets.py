"""Secrets in the environment are written nowhere: canaries are searched for in all output and files."""

import logging
from pathlib import Path

import pytest

from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from forge.core.settings import load_settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.packages import fetch_package
from forge.registry.promotion import promote
from forge.storage import open_store
from tasks.register.history import lineage, lineage_tree
from tests.register.packages import inputs
from tests.registry.test_packages import keys
from tests.storage.servers import KEY, SECRET, client_of, rclone

CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-aws",
    "HF_TOKEN": "hf_canary_of_the_hub",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow",
    "MLFLOW_TRACKING_TOKEN": "canary-token",
    "FORGE_TEST_NOTHING": "canary-nothing",
}


def test_no_secret_is_written_anywhere(
    tmp_path: Path,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    pair = keys(tmp_path)
    private = pair["signing_key"].read_text().splitlines()[1]
    (tmp_path / "server").mkdir()
    with rclone(tmp_path / "server") as url:
        client_of(url).make_bucket("forge")
        given = {
            "FORGE_HOME": str(tmp_path / "home"),
            "FORGE_STORE": "s3://forge/store",
            "FORGE_S3_ENDPOINT": url,
            "FORGE_S3_ACCESS_KEY": KEY,
            "FORGE_S3_SECRET_KEY": SECRET,
            "FORGE_SIGNING_KEY": str(pair["signing_key"]),
            "FORGE_VERIFY_KEY": str(pair["verify_key"]),
        }
        for name, value in {**CANARIES, **given}.items():
            monkeypatch.setenv(name, value)
        settings = load_settings()
        store = open_store(settings)
        version = inputs(tmp_path, settings, recipe).register(settings)
        promote(open_registry(settings), store, "dates", version.version, "", "better")
        fetch_package("models:/dates@champion", settings, store)
        print(lineage_tree(lineage("models:/dates@champion", settings, store)), settings)
        monkeypatch.setenv("FORGE_S3_SECRET_KEY", f"wrong-{SECRET}")
        with pytest.raises(ForgeError) as refused:
            open_store(load_settings()).read("identity")
    written = {
        path: path.read_bytes()
        for place in ("home", "server")
        for path in (tmp_path / place).rglob("*")
        if path.is_file()
    }
    assert len(written) > 10
    shown = capfd.readouterr()
    texts = {
        "the terminal": f"{shown.out}{shown.err}".encode(),
        "the log": caplog.text.encode(),
        "an error": refused.value.message.encode(),
        **written,
    }
    for secret in (*CANARIES.values(), SECRET, private):
        assert [place for place, text in texts.items() if secret.encode() in text] == [], secret
