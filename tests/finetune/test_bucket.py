"""Copies of checkpoints, on a real S3 server: a run goes on from them where its own directory is gone."""

import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from minio import Minio
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from tasks.errors import ForgeError
from tasks.finetune.bucket import Bucket
from tasks.finetune.train import Job, Trainer
from tasks.preflight.checks import check_copies
from tasks.settings import Settings
from tests.finetune.job import CONFIGS, write_base, write_data
from tests.finetune.test_trainer import job, rank, same, stopped, trained


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


def copied(places: tuple[Path, Path], checkpoints: Path, settings: Settings) -> Job:
    plain = job(places, checkpoints, checkpoint_steps=2, keep_checkpoints=2)
    copies = Bucket(f"{settings.checkpoint_copies}/job", settings)
    return Job(plain.data, plain.base, plain.model, plain.training, checkpoints, copies)


def test_a_run_goes_on_where_only_the_copies_are_left(
    places: tuple[Path, Path], tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(copied(places, tmp_path / "here", settings), after=7)
    steps = {name.split("/")[2] for name in names(settings)}
    assert steps == {"00000006", "00000007"}, "as many are kept there as here"
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


def test_a_bucket_that_is_not_there_is_found_before_anything_starts(settings: Settings) -> None:
    check_copies(settings)
    client(settings).remove_bucket("night")
    with pytest.raises(ForgeError, match="there is no bucket night; make it"):
        check_copies(settings)
