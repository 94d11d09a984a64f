"""The Flyte tasks of preprocessing, run by Flyte."""

from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from forge.core.contracts import Base, Dataset, Source
from forge.core.recipe import DataRecipe
from forge.core.settings import load_settings
from forge.storage import DirectoryStore, open_store
from tasks.preprocess.sources import digest_source, pin
from tasks.preprocess.task import prepare_whole, preprocess_data
from tests.conftest import chat, start_task, write_jsonl
from tests.storage.servers import KEY, SECRET, rclone


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    """The store that the tasks open."""
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "0")
    return open_store(load_settings())


def run(store: DirectoryStore, **options: object) -> Dataset:
    recipe = DataRecipe.model_validate({"max_seq_len": 128, "heldout_fraction": 0.2, **options})
    uri, _ = pin(recipe, recipe.source)
    source = Source(uri=uri, digest=digest_source(recipe), store=store.identity)
    return preprocess_data(source=source, data=recipe, base=Base())


def test_map_task_over_shards_gives_the_same_data_set(store: DirectoryStore, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {n}", f"answer {n}") for n in range(100)])
    whole = run(store, source=path.as_uri())
    sharded = run(store, source=path.as_uri(), shards=3)
    assert sharded.digest == whole.digest
    assert sharded.train_rows == whole.train_rows > 0


def never(*arguments: object) -> None:
    raise AssertionError("rows were read again")


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_published_data_set_is_found_by_the_next_attempt(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt is interrupted right after publishing."""
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {n}", f"answer {n}") for n in range(100)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tasks.preprocess.task._show_report", interrupted)
        run(store, source=path.as_uri())
    (published,) = (store.root / "datasets").iterdir()
    monkeypatch.setattr("tasks.preprocess.prepare.read_part", never)
    assert run(store, source=path.as_uri()).uri == published.as_uri()
    with pytest.raises(AssertionError, match="read again"):
        run(store, source=path.as_uri(), heldout_fraction=0.3)


@pytest.mark.parametrize("removed", [0, 1])
def test_packed_shards_are_not_read_again(
    removed: int, store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the first attempt was interrupted while it removed them."""
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {n}", f"answer {n}") for n in range(100)])
    left = [removed]
    remove = DirectoryStore.remove

    def remove_some(store: DirectoryStore, uri: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        remove(store, uri)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DirectoryStore, "remove", remove_some)
        run(store, source=path.as_uri(), shards=3)
    (published,) = (store.root / "datasets").iterdir()
    assert any((store.root / "parts").iterdir())
    monkeypatch.setattr("tasks.preprocess.prepare.read_part", never)
    assert run(store, source=path.as_uri(), shards=3).uri == published.as_uri()
    assert list((store.root / "parts").iterdir()) == []


def test_published_shards_are_not_read_again(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {n}", f"answer {n}") for n in range(100)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tasks.preprocess.prepare.assemble", interrupted)
        run(store, source=path.as_uri(), shards=3)
    monkeypatch.setattr("tasks.preprocess.prepare.read_part", never)
    assert run(store, source=path.as_uri(), shards=3).train_rows > 0


def test_successful_task_writes_nothing_to_stderr(store: DirectoryStore, tmp_path: Path) -> None:
    """Run as in a pod, with Flyte's values in a bucket: sessions are closed, and there is no deck of dependencies."""
    data = DataRecipe.model_validate({"source": "demonstration", "demonstration": {"rows": 300}, "max_seq_len": 128})
    source = Source(uri="demonstration", digest=digest_source(data), store=store.identity)
    (tmp_path / "server" / "flyte").mkdir(parents=True)
    with rclone(tmp_path / "server") as url:
        flyte_s3 = {"FLYTE_AWS_ENDPOINT": url, "FLYTE_AWS_ACCESS_KEY_ID": KEY, "FLYTE_AWS_SECRET_ACCESS_KEY": SECRET}
        inputs = {"source": source, "data": data, "base": Base()}
        process = start_task(prepare_whole, inputs, "s3://flyte/outputs", tmp_path, **flyte_s3)
        printed, _ = process.communicate(timeout=300)
    assert (process.returncode, (tmp_path / "stderr").read_text()) == (0, ""), printed
    outputs = tmp_path / "server" / "flyte" / "outputs"
    assert {path.name for path in outputs.iterdir()} == {"deck.html", "outputs.pb"}
    assert "Dependencies" not in (outputs / "deck.html").read_text()


def test_source_in_a_bucket(store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert remote.digest == run(store, source=path.as_uri()).digest
