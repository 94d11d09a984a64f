"""Small packages of random bytes in stores of every kind, for tests that need no real model."""

import contextlib
import json
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forge.core.contracts import Base, Dataset, Evaluation, Model, Version
from forge.core.recipe import Lora, Recipe
from forge.core.settings import Settings
from forge.storage import Store, open_store
from tasks.register.publish import build_package
from tasks.register.register import register
from tests.storage.servers import MAKES, client_of, settings_of, shared_server

KINDS = ("directory", *MAKES)


@contextlib.contextmanager
def machine(kind: str, directory: Path, **more: Any) -> Iterator[Settings]:
    """Settings of a machine whose store is a directory, or a bucket on one kind of S3 server."""
    if kind == "directory":
        yield Settings(home=directory / "machine", **more)
        return
    url, bucket = shared_server(kind), f"registry-{uuid.uuid4().hex[:8]}"
    client_of(url).make_bucket(bucket)
    yield settings_of(url, home=directory / "machine", store=f"s3://{bucket}/forge", **more)


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a machine with a store of each kind."""
    with machine(request.param, tmp_path) as machine_settings:
        yield machine_settings


def facts_of(name: str = "dates", **more: Any) -> dict[str, Any]:
    """The facts of a package's manifest."""
    return {
        "kind": "model",
        "name": name,
        "model_digest": "a" * 64,
        "base": {"location": "random weights", "revision": ""},
        "dataset": "d" * 64,
        "recipe": "c" * 64,
        "evaluation": "e" * 64,
        "verdict": "passed: better",
        "metrics": {"score": 0.75},
        "versions": {"torch": "2.13.0"},
        "made_by": "user@host",
        **more,
    }


def write_model(directory: Path, seed: bytes = b"1") -> Path:
    """Write the files of a model."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(seed * 100_000)
    return directory


def make(directory: Path, settings: Settings, store: Store, seed: bytes = b"1", **more: Any) -> tuple[str, str]:
    """Publish a package of random bytes; returns its URI and digest."""
    return build_package(write_model(directory, seed), facts_of(**more), settings, store)


class Inputs(NamedTuple):
    """The inputs of registration."""

    recipe: Recipe
    dataset: Dataset
    model: Model
    evaluation: Evaluation

    def register(self, settings: Settings) -> Version:
        """Register the model."""
        return register(*self, settings, open_store(settings))


def inputs(
    directory: Path,
    settings: Settings,
    recipe: Recipe,
    seed: bytes = b"1",
    size: int = 100_000,
    base: Version | None = None,
) -> Inputs:
    """Publish the results of training and evaluation, of random bytes, to the settings' store.

    With a base, the model is an adapter of that version.
    """
    store = open_store(settings)
    common = {"store": store.identity}
    training = {"base": {"location": "random weights", "revision": ""}, "versions": {"torch": "2.13.0"}}
    if base is not None:
        training["base"] = {"location": base.uri, "revision": base.digest}
        lora = recipe.training.model_copy(update={"method": "lora", "lora": Lora()})
        recipe = recipe.model_copy(update={"training": lora})
    training |= {"curve": [{"step": 1, "loss": 2.0}], "tokens_per_second": 1000, "made_by": "user@host"}
    with store.stage() as staged:
        write_model(staged / "model")
        (staged / "model" / "model.safetensors").write_bytes(random.Random(seed).randbytes(size))
        (staged / "model" / "config.json").write_text('{"dtype": "float32"}')
        if base is not None:
            (staged / "adapter").mkdir()
            (staged / "adapter" / "adapter_config.json").write_text('{"r": 4}')
            (staged / "adapter" / "adapter_model.safetensors").write_bytes(seed * 1000)
        (staged / "training.json").write_text(json.dumps(training))
        trained = store.publish(staged, "trained")
    with store.stage() as staged:
        card = {"source": {"uri": "s3://team/raw", "digest": "r" * 64}}
        (staged / "dataset.json").write_text(json.dumps(card))
        rows = store.publish(staged, "datasets", "d" * 64)
    with store.stage() as staged:
        (staged / "report.html").write_text(f"<p>{seed!r}")
        evaluated = store.publish(staged, "evaluations")
    scores = {"score": 0.75, "score_base": 0.1, "exact_match": 0.75, "nll": 0.2, "nll_base": 5.0, "json_validity": None}
    return Inputs(
        recipe,
        Dataset(uri=rows, digest="d" * 64, train_rows=10, heldout_rows=2, **common),
        Model(uri=trained, digest=seed.hex(), base=Base(), **common),
        Evaluation(
            uri=evaluated,
            digest="e" * 64,
            items=2,
            verdict="passed",
            reason="passed: better",
            report=f"{evaluated}/report.html",
            **scores,
            **common,
        ),
    )
