"""The doors of preprocessing, as Flyte runs them."""

from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from tasks.contracts import Base, Dataset, Source
from tasks.preprocess.sources import digest_source, pin
from tasks.preprocess.task import preprocess_data
from tasks.recipe import DataRecipe
from tasks.settings import load_settings
from tasks.storage import DirectoryStore, open_store
from tests.conftest import chat, write_jsonl


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    """The store that the doors open."""
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "0")
    return open_store(load_settings())


def run(store: DirectoryStore, **options: object) -> Dataset:
    recipe = DataRecipe.model_validate({"context": 128, "heldout_fraction": 0.2, **options})
    uri, _ = pin(recipe, recipe.source)
    source = Source(uri=uri, digest=digest_source(recipe), store=store.identity)
    return preprocess_data(source=source, data=recipe, base=Base())


def test_a_map_task_over_shards_comes_to_the_same_data_set(store: DirectoryStore, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {n}", f"answer {n}") for n in range(100)])
    whole = run(store, source=str(path))
    sharded = run(store, source=str(path), shards=3)
    assert sharded.digest == whole.digest
    assert sharded.train_rows == whole.train_rows > 0


def test_rows_in_a_bucket(store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minio import Minio

    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {n}", f"answer {n}") for n in range(100)])
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        client = Minio(f"127.0.0.1:{port}", "key", "secret", secure=False, region="us-east-1")
        client.make_bucket("team")
        client.fput_object("team", "raw/rows.jsonl", str(path))
        monkeypatch.setenv("FORGE_S3_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("FORGE_S3_ACCESS_KEY", "key")
        monkeypatch.setenv("FORGE_S3_SECRET_KEY", "secret")
        remote = run(store, source="s3://team/raw")
    finally:
        server.stop()
    assert remote.digest == run(store, source=str(path)).digest
