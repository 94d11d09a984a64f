"""Rollouts in processes that are killed. They are forked from a process that has done the slow imports once."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mlflow import MlflowClient

from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.promotion import promote
from forge.serving import trial
from forge.serving.desired import RolloutState, Served
from forge.serving.local_target import FileDocument, LocalTarget
from forge.serving.trial import Recovery, active_rollout
from forge.storage import DirectoryStore
from tasks.rollout import rollout
from tests.serving.place import QUICK
from tests.serving.states import serving, version

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def crash(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a process that kills itself."""
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def die(*_: object, **__: object) -> NoReturn:
    """Exit as after SIGKILL, without any cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def change_document(home: Path, when: str) -> None:
    """Start a rollout of version 2 and die "before" its promotion, when it is "recorded", or once it is "promoted"."""
    settings = Settings(home=home)
    client, store = open_registry(settings), DirectoryStore(settings.store_root)
    recovery = Recovery(lambda: store, settings)
    with active_rollout(FileDocument(settings), version(2), "1", recovery, 1) as active:
        active.reached(RolloutState.PROVED)
        active.change(serving(version(1), version(2)))
        if when == "recorded":
            MlflowClient.set_registered_model_alias = die
        if when != "before":
            promote(client, store, "dates", "2", "1", "passed", active.trial.id)
        die()


def roll_out(settings: Settings, served: Served, when: str) -> None:
    """Roll a version out, and die "before the promotion" or "after the promotion"."""
    LocalTarget.ensure = lambda self: None  # the test's own process is the reconciler, and must not be replaced
    if when == "before the promotion":
        rollout.promote = die
    else:
        trial.ActiveRollout.finish = die
    store = DirectoryStore(settings.store_root)
    package, manifest = store.path(served.uri), store.manifest(served.uri)
    rollout.serve(rollout.Candidate(served, package, manifest, None, "1", "a test"), QUICK, settings, store)
