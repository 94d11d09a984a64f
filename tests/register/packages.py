"""Small packages of random bytes in stores of every kind, for tests that need no model in them."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.register.package import build_package
from tasks.settings import Settings
from tasks.storage import Store
from tests.storage.servers import client_of, moto, rclone, settings_of

KINDS = ("directory", "moto", "rclone")


@contextlib.contextmanager
def machine(kind: str, directory: Path, **more: Any) -> Iterator[Settings]:
    """Settings of a machine whose store is a directory, or a bucket on a server of some make."""
    if kind == "directory":
        yield Settings(home=directory / "machine", **more)
        return
    (directory / "rclone").mkdir()
    with {"moto": moto, "rclone": lambda: rclone(directory / "rclone")}[kind]() as url:
        bucket = f"registry-{uuid.uuid4().hex[:8]}"  # moto in this process is one, however often it is started
        client_of(url).make_bucket(bucket)
        yield settings_of(url, home=directory / "machine", store=f"s3://{bucket}/forge", **more)


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a machine with a store of each kind."""
    with machine(request.param, tmp_path) as made:
        yield made


def facts_of(name: str = "dates", **more: Any) -> dict[str, Any]:
    """What a package's manifest says."""
    return {
        "kind": "model",
        "name": name,
        "model_digest": "a" * 64,
        "base": {"location": "random weights", "revision": ""},
        "dataset": "d" * 64,
        "recipe": "c" * 64,
        "evaluation": "e" * 64,
        "verdict": "pass: better",
        "metrics": {"score": 0.75},
        "versions": {"torch": "2.13.0"},
        "made_by": "somebody@somewhere",
        **more,
    }


def write_model(directory: Path, seed: bytes = b"1") -> Path:
    """Files as a model has them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(seed * 100_000)
    return directory


def make(directory: Path, settings: Settings, store: Store, seed: bytes = b"1", **more: Any) -> tuple[str, str]:
    """Publish a package of files that the seed decides; returns its URI and digest."""
    return build_package(write_model(directory, seed), facts_of(**more), settings, store)
