"""Registration that is killed at any moment, or runs concurrently: one package, one version, nothing left over."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from forge.storage import lease, open_store, transfer
from tests.register.packages import KINDS, Inputs, inputs, machine
from tests.storage.servers import client_of

pytestmark = pytest.mark.long

KILLS = 30
MODELS = 6
SIZE = 12_000_000  # bytes of the model: several parts
CONTEXT = multiprocessing.get_context("forkserver")  # its children inherit the slow imports
CONTEXT.set_forkserver_preload([__name__, "mlflow", "minio", "huggingface_hub", "mlflow.store.db.utils"])


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a machine with a store of each kind and an existing registry."""
    with machine(request.param, tmp_path) as machine_settings:
        open_registry(machine_settings)
        yield machine_settings


def _register(settings: Settings, given: Inputs) -> str:
    """Register, in a process of its own; leases of dead processes are taken over quickly."""
    lease.RENEWED, lease.ABANDONED, transfer.PART = 0.2, 1.5, 5 << 20
    return given.register(settings).version


def check_whole(settings: Settings, given: Inputs) -> None:
    """Check that there is one package, one version, one run, and no incomplete upload."""
    client, store = open_registry(settings), open_store(settings)
    name = given.recipe.name
    (version,) = client.search_model_versions(f"name = '{name}'")
    (package,) = store.artifacts(f"models/{name}")
    assert (package.uri, package.whole) == (version.source, True)
    experiment = client.get_experiment_by_name(name)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_id) == ("FINISHED", version.run_id)
    weights = (store.path(given.model.uri) / "model" / "model.safetensors").read_bytes()
    assert (store.path(package.uri) / "model.safetensors").read_bytes() == weights
    if settings.store:
        store.sweep("models", timedelta(0))
        server, bucket = client_of(settings.s3_endpoint), settings.store.split("/")[2]
        assert server._list_multipart_uploads(bucket).uploads == []
    else:
        staging = store.root / ".staging"  # type: ignore[union-attr]
        assert [path for path in staging.iterdir() if not path.name.startswith(f"{os.getpid()}-")] == []


def start(settings: Settings, given: Inputs) -> BaseProcess:
    process = CONTEXT.Process(target=_register, args=(settings, given))
    process.start()
    return process


def test_a_registration_that_is_killed_at_any_moment_is_completed_by_the_next(
    settings: Settings, tmp_path: Path, recipe: Recipe
) -> None:
    given = inputs(tmp_path, settings, recipe, size=SIZE)
    named = recipe.model_copy(update={"name": "rehearsal"})
    rehearsal = start(settings, given._replace(recipe=named))  # to measure its time
    started = time.monotonic()
    rehearsal.join()
    assert rehearsal.exitcode == 0
    seconds = time.monotonic() - started
    store = open_store(settings)
    for package in store.artifacts("models"):
        store.remove(package.uri)
    chance = random.Random(0)
    killed = 0
    for model in range(MODELS):  # a new one each, since attempts get shorter: files already uploaded are skipped
        name = f"dates-{model}"
        given = inputs(tmp_path, settings, recipe.model_copy(update={"name": name}), bytes([model]), SIZE)
        for _ in range(KILLS // MODELS):
            process = start(settings, given)
            process.join(chance.uniform(0, seconds))
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                killed += 1
            process.join()
        last = start(settings, given)
        last.join()
        assert last.exitcode == 0
        check_whole(settings, given)
    print(f"{killed} of {KILLS} attempts were killed before they finished")
    assert killed > 0


def test_eight_concurrent_registrations_give_one_version(settings: Settings, tmp_path: Path, recipe: Recipe) -> None:
    given = inputs(tmp_path, settings, recipe, size=SIZE)
    with CONTEXT.Pool(8) as pool:
        assert pool.starmap(_register, [(settings, given)] * 8) == ["1"] * 8
    check_whole(settings, given)
