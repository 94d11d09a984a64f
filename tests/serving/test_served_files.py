"""The files of a model to serve."""

import json
from pathlib import Path

import pytest

from forge.core.digest import digest_directory
from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.serving.desired import Served
from forge.serving.served_files import base_config_and_size, fetch_served
from forge.storage import DirectoryStore
from tests.serving.place import CONFIG, publish


def test_a_directory_is_served_while_it_is_unchanged(tmp_path: Path, store: DirectoryStore) -> None:
    directory = tmp_path / "a base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "model.safetensors").write_bytes(b"1234")
    digest, _ = digest_directory(directory)
    for uri in (directory.as_uri(), str(directory)):  # as now, and as in older documents
        base = Served(name="a base", version="", uri=uri, digest=digest)
        assert fetch_served(base, Settings(), store) == directory
        assert base_config_and_size(base, store) == (CONFIG, 4)
    (directory / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(ForgeError, match="was changed since its adapter was trained on it"):
        fetch_served(base, Settings(), store)
    (directory / "config.json").unlink()
    for ask in (lambda: fetch_served(base, Settings(), store), lambda: base_config_and_size(base, store)):
        with pytest.raises(ForgeError, match=r"its config\.json is missing"):
            ask()


def test_a_package_is_verified(store: DirectoryStore) -> None:
    one = publish(store, "1")
    assert fetch_served(one, Settings(), store) == store.path(one.uri)
    assert base_config_and_size(one, store) == (CONFIG, 0)
    (store.path(one.uri) / "version").write_text("9")
    with pytest.raises(ForgeError, match="version"):
        fetch_served(one, Settings(), store)
