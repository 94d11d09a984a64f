"""Copies of checkpoints on an S3 server: a run resumes from them if its own directory is missing."""

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
from tasks.finetune.checkpoint_mirror import STATE, CheckpointMirror
from tasks.finetune.process_group import Stopped
from tasks.finetune.train import Trainer, TrainingJob
from tasks.preflight.service_checks import check_copies
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
    """Settings for an S3 server with an empty bucket."""
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


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name.startswith("tasks.") and record.levelno > 20
    ]


def copied(places: tuple[Path, Path], checkpoints: Path, settings: Settings, **training: Any) -> TrainingJob:
    plain = job(places, checkpoints, **{"checkpoint_steps": 2, "keep_checkpoints": 2, **training})
    mirror = CheckpointMirror(f"{settings.checkpoint_copies}/job", settings)
    return TrainingJob(plain.data, plain.base, plain.model, plain.training, checkpoints, mirror)


def test_run_resumes_from_the_copies(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(copied(places, tmp_path / "here", settings), after=7)
    steps = {name.split("/")[2] for name in names(settings)}
    assert "00000007" in steps <= {"00000006", "00000007"}, "the same number is kept as locally"
    shutil.rmtree(tmp_path / "here")
    # An interrupted copy has no state yet, and is ignored.
    client(settings).fput_object("night", "runs/job/00000009/__0_0.distcp", str(places[0] / "dataset.json"))
    resumed = trained(copied(places, tmp_path / "there", settings))
    assert "resuming after step 7" in caplog.text
    assert same(resumed, trained(job(places, tmp_path / "other", checkpoint_steps=2, keep_checkpoints=2)))
    resumed.checkpoints.remove()
    assert names(settings) == []


def test_failed_copies_are_logged_and_do_not_stop_training(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    mine = copied(places, tmp_path / "here", settings)
    client(settings).remove_bucket("night")
    with pytest.raises(ForgeError, match=r"checkpoints s3://night/runs/job: .* answers NoSuchBucket"):
        trained(mine)  # whether it has an earlier checkpoint is unknown
    client(settings).make_bucket("night")
    trainer = Trainer(rank(), mine)
    client(settings).remove_bucket("night")
    trainer.train()
    trainer.checkpoints.settle()
    assert "checkpoints s3://night/runs/job" in caplog.text
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["00000010", "00000012"]


def test_best_checkpoint_is_downloaded_too(places: tuple[Path, Path], tmp_path: Path, settings: Settings) -> None:
    how = {
        "epochs": 40,
        "learning_rate": 0.02,
        "early_stopping_patience": 2,
        "checkpoint_steps": None,
        "keep_checkpoints": 1,
    }
    whole = trained(job(places, tmp_path / "whole", **how))
    best, last = whole.state.best_step, whole.state.step
    assert best is not None
    trainer = Trainer(rank(), copied(places, tmp_path / "here", settings, **how))
    in_step(trainer, last - 1, trainer.rank.stop.set)
    with pytest.raises(Stopped):
        trainer.train()
    shutil.rmtree(tmp_path / "here")
    assert same(trained(copied(places, tmp_path / "there", settings, **how)), whole)
    client(settings).remove_object("night", f"runs/job/{best:08}/{STATE}")
    with pytest.raises(ForgeError, match=f"there is no complete copy of {best:08}"):  # before training
        Trainer(rank(), copied(places, tmp_path / "elsewhere", settings, **how))


def test_training_does_not_wait_for_copies_and_the_last_one_is_completed(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    started, resume, seen = threading.Event(), threading.Event(), set()

    def hold(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        if path.endswith(".distcp"):
            seen.add(path.split("/")[-2])
            started.set()
            assert resume.wait(60)
        return [serve()]

    with tampering(hold) as url:
        trainer = Trainer(rank(), copied(places, tmp_path / "here", settings.model_copy(update={"s3_endpoint": url})))
        in_step(trainer, 5, started.wait)  # until the first one is being copied
        trainer.train()
        local = {path.name for path in (tmp_path / "here").iterdir()}
        assert local == {"00000002", "00000010", "00000012"}, "a checkpoint that is being copied is not pruned"
        resume.set()
        trainer.checkpoints.settle()
        assert seen == {"00000002", "00000012"}
    assert {name.split("/")[2] for name in names(settings)} == {"00000012"}
    assert warnings(caplog) == []


def test_slow_upload_is_not_a_failure(tmp_path: Path, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    def late(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        if path.endswith(".distcp"):
            time.sleep(6)  # longer than the timeout for connecting
        return [serve()]

    place = tmp_path / "00000002"
    place.mkdir()
    (place / "__0_0.distcp").write_bytes(bytes(32 << 20))  # more than socket buffers hold
    (place / STATE).write_text("{}")
    with tampering(late) as url:
        mirror = CheckpointMirror("s3://night/runs/job", settings.model_copy(update={"s3_endpoint": url}))
        mirror.copy([place], {place.name})
        mirror.wait()
    assert warnings(caplog) == []
    assert mirror.in_use() == set()
    assert names(settings) == ["runs/job/00000002/__0_0.distcp", f"runs/job/00000002/{STATE}"]


def test_interrupted_download_is_repeated(places: tuple[Path, Path], tmp_path: Path, settings: Settings) -> None:
    stopped(copied(places, tmp_path / "here", settings), after=7)
    cuts = iter([1000])

    def cut(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        body = serve()
        return [body[: -next(cuts, 0) or None] if path.endswith(".distcp") and len(body) > 1000 else body]

    with tampering(cut) as url:
        resumed = Trainer(rank(), copied(places, tmp_path / "there", settings.model_copy(update={"s3_endpoint": url})))
    assert resumed.state.step == 7
    assert next(cuts, None) is None


def test_no_rank_exits_before_the_first_one_has_copied(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, resume = threading.Event(), threading.Event()

    def hold(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        if path.endswith(".distcp"):
            started.set()
            assert resume.wait(60)
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
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
        ranks["1"].send_signal(signal.SIGTERM)  # only this rank, not the launcher
        assert started.wait(60)
        time.sleep(3)  # enough for the launcher to notice an exited rank and kill the others
        assert all(ranks[rank].is_running() and ranks[rank].status() != psutil.STATUS_ZOMBIE for rank in "01")
        resume.set()
        output, _ = process.communicate(timeout=60)
    assert "saved its state" in output
    (saved,) = (tmp_path / "out.checkpoints").iterdir()
    assert [name.split("/")[2:] for name in names(settings) if name.endswith(STATE)] == [[saved.name, STATE]]


def test_missing_bucket_is_found_by_preflight(settings: Settings) -> None:
    check_copies(settings)
    client(settings).remove_bucket("night")
    with pytest.raises(ForgeError, match="there is no bucket night; create it"):
        check_copies(settings)
