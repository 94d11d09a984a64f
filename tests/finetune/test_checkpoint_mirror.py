"""Copies of checkpoints, on a real S3 server: a run goes on from them where its own directory is gone."""

import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from minio import Minio
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from tasks.finetune.checkpoint_mirror import FACTS, Bucket
from tasks.finetune.process_group import Stopped
from tasks.finetune.train import Trainer, TrainingJob
from tasks.preflight.checks import check_copies
from tests.finetune.job import CONFIGS, start, write_base, write_data, write_recipe
from tests.finetune.test_trainer import in_step, job, rank, same, stopped, trained
from tests.storage.test_remote_files import tampering


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Packed rows, and a base model."""
    directory = tmp_path_factory.mktemp("job")
    return write_data(directory / "data"), write_base(CONFIGS["llama"], directory / "base")


@pytest.fixture
def settings() -> Iterator[Settings]:
    """Those of a server with an empty bucket."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    keys = {"s3_access_key": SecretStr("someone"), "s3_secret_key": SecretStr("secret-of-someone")}
    settings = Settings(s3_endpoint=endpoint, checkpoint_copies="s3://night/runs/", **keys)
    client(settings).make_bucket("night")
    yield settings
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()  # noqa: S310
    moto.stop()


def client(settings: Settings) -> Minio:
    return Minio(settings.s3_endpoint.removeprefix("http://"), "someone", "secret-of-someone", secure=False)


def names(settings: Settings) -> list[str]:
    return sorted(item.object_name or "" for item in client(settings).list_objects("night", recursive=True))


def copied(places: tuple[Path, Path], checkpoints: Path, settings: Settings, **training: Any) -> TrainingJob:
    plain = job(places, checkpoints, **{"checkpoint_steps": 2, "keep_checkpoints": 2, **training})
    copies = Bucket(f"{settings.checkpoint_copies}/job", settings)
    return TrainingJob(plain.data, plain.base, plain.model, plain.training, checkpoints, copies)


def test_a_run_goes_on_where_only_the_copies_are_left(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(copied(places, tmp_path / "here", settings), after=7)
    steps = {name.split("/")[2] for name in names(settings)}
    assert "00000007" in steps <= {"00000006", "00000007"}, "no more are kept there than here"
    shutil.rmtree(tmp_path / "here")
    # A copy that was broken off has no facts yet, and does not count.
    client(settings).fput_object("night", "runs/job/00000009/__0_0.distcp", str(places[0] / "dataset.json"))
    again = trained(copied(places, tmp_path / "there", settings))
    assert "goes on after step 7" in capsys.readouterr().out
    assert same(again, trained(job(places, tmp_path / "other", checkpoint_steps=2, keep_checkpoints=2)))
    again.checkpoints.remove()
    assert names(settings) == []


def test_copies_that_fail_are_told_and_end_nothing(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = copied(places, tmp_path / "here", settings)
    client(settings).remove_bucket("night")
    with pytest.raises(ForgeError, match=r"checkpoints s3://night/runs/job: .* answers NoSuchBucket"):
        trained(mine)  # that it has no earlier checkpoint cannot be known
    client(settings).make_bucket("night")
    trainer = Trainer(rank(), mine)
    client(settings).remove_bucket("night")
    trainer.train()
    trainer.checkpoints.settle()
    assert "checkpoints s3://night/runs/job" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["00000010", "00000012"]


def test_the_best_checkpoint_is_fetched_too(places: tuple[Path, Path], tmp_path: Path, settings: Settings) -> None:
    how = {
        "epochs": 40,
        "learning_rate": 0.02,
        "early_stopping_patience": 2,
        "checkpoint_steps": None,
        "keep_checkpoints": 1,
    }
    whole = trained(job(places, tmp_path / "whole", **how))
    best, last = whole.facts.best_step, whole.facts.step
    assert best is not None
    trainer = Trainer(rank(), copied(places, tmp_path / "here", settings, **how))
    in_step(trainer, last - 1, trainer.rank.stop.set)
    with pytest.raises(Stopped):
        trainer.train()
    shutil.rmtree(tmp_path / "here")
    assert same(trained(copied(places, tmp_path / "there", settings, **how)), whole)
    client(settings).remove_object("night", f"runs/job/{best:08}/{FACTS}")
    with pytest.raises(ForgeError, match=f"there is no whole copy of {best:08}"):  # now, and not after the last step
        Trainer(rank(), copied(places, tmp_path / "elsewhere", settings, **how))


def test_training_does_not_wait_for_a_copy_and_the_last_one_is_made(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, go_on, seen = threading.Event(), threading.Event(), set()

    def hold(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        if path.endswith(".distcp"):
            seen.add(path.split("/")[-2])
            begun.set()
            assert go_on.wait(60)
        return [serve()]

    with tampering(hold) as url:
        trainer = Trainer(rank(), copied(places, tmp_path / "here", settings.model_copy(update={"s3_endpoint": url})))
        in_step(trainer, 5, begun.wait)  # until the first one is being copied
        trainer.train()
        here = {path.name for path in (tmp_path / "here").iterdir()}
        assert here == {"00000002", "00000010", "00000012"}, "what is being copied is left in place"
        go_on.set()
        trainer.checkpoints.settle()
        assert seen == {"00000002", "00000012"}
    assert {name.split("/")[2] for name in names(settings)} == {"00000012"}
    assert capsys.readouterr().err == ""


def test_a_slow_upload_is_no_failure(tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    def late(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        if path.endswith(".distcp"):
            time.sleep(6)  # more than there is to connect in
        return [serve()]

    place = tmp_path / "00000002"
    place.mkdir()
    (place / "__0_0.distcp").write_bytes(bytes(32 << 20))  # more than waits in sockets
    (place / FACTS).write_text("{}")
    with tampering(late) as url:
        bucket = Bucket("s3://night/runs/job", settings.model_copy(update={"s3_endpoint": url}))
        bucket.copy([place], {place.name})
        bucket.wait()
    assert capsys.readouterr().err == ""
    assert bucket.needed() == set()
    assert names(settings) == ["runs/job/00000002/__0_0.distcp", f"runs/job/00000002/{FACTS}"]


def test_a_download_that_breaks_off_is_begun_again(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings
) -> None:
    stopped(copied(places, tmp_path / "here", settings), after=7)
    cuts = iter([1000])

    def cut(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        body = serve()
        return [body[: -next(cuts, 0) or None] if path.endswith(".distcp") and len(body) > 1000 else body]

    with tampering(cut) as url:
        again = Trainer(rank(), copied(places, tmp_path / "there", settings.model_copy(update={"s3_endpoint": url})))
    assert again.facts.step == 7
    assert next(cuts, None) is None


def test_under_torchrun_no_rank_leaves_before_the_first_one_has_made_its_copy(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        if path.endswith(".distcp"):
            begun.set()
            assert go_on.wait(60)
        return [serve()]

    recipe = write_recipe(tmp_path / "recipe.yaml", nproc_per_node=2, epochs=200, checkpoint_steps=1000)
    with tampering(hold) as url:
        monkeypatch.setenv("FORGE_CHECKPOINT_COPIES", settings.checkpoint_copies)
        monkeypatch.setenv("FORGE_S3_ENDPOINT", url)
        monkeypatch.setenv("FORGE_S3_ACCESS_KEY", "someone")
        monkeypatch.setenv("FORGE_S3_SECRET_KEY", "secret-of-someone")
        process = start(recipe, places[0], tmp_path / "out", 2)
        assert process.stdout is not None
        while "train: " not in process.stdout.readline():
            assert process.poll() is None
        ranks = {one.environ().get("RANK"): one for one in psutil.Process(process.pid).children(recursive=True)}
        ranks["1"].send_signal(signal.SIGTERM)  # that one alone, and not the launcher
        assert begun.wait(60)
        time.sleep(3)  # if it left before the others, the launcher would see it by now, and end them
        assert [ranks[one].is_running() and ranks[one].status() != psutil.STATUS_ZOMBIE for one in "01"] == [True, True]
        go_on.set()
        output, _ = process.communicate(timeout=60)
    assert "all of it is saved" in output
    (saved,) = (tmp_path / "out.checkpoints").iterdir()
    assert [name.split("/")[2:] for name in names(settings) if name.endswith(FACTS)] == [[saved.name, FACTS]]


def test_a_bucket_that_is_not_there_is_found_before_anything_starts(settings: Settings) -> None:
    check_copies(settings)
    client(settings).remove_bucket("night")
    with pytest.raises(ForgeError, match="there is no bucket night; make it"):
        check_copies(settings)
