"""The stage's work: change what should be served, prove it live, watch it, and only then make it the champion."""

import contextlib
import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from forge.core.contracts import Deployment, Evaluation, Version
from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import find_champion, open_registry, translate_mlflow_errors
from forge.registry.packages import ADAPTER, open_package
from forge.registry.promotion import not_the_champion, promote
from forge.serving.desired import Actual, Desired, Served, Serving, Trial
from forge.serving.plan import loading_state
from forge.serving.rollout_check import state_after_rollout
from forge.serving.served_files import base_config_and_size
from forge.serving.targets import Target, open_target
from forge.serving.trial import BROKEN_OFF, ActiveRollout, Recovery, TrialLost, active_rollout, is_promoted, tag_failed
from forge.storage import Store
from tasks.rollout.prove import prove, read_replay
from tasks.rollout.watch import Latency, Watch

log = logging.getLogger(__name__)

POLL = 0.1  # seconds


@dataclass(frozen=True)
class Candidate:
    """What is to be served: its package, the evaluation to replay (if there is one), and what it is to replace.

    `champion` is the version that it was compared with ("" for none), and `why` is what is recorded of its promotion.
    """

    served: Served
    package: Path
    manifest: dict[str, Any]
    evaluation: Path | None
    champion: str
    why: str


def roll_out(
    version: Version, evaluation: Evaluation, recipe: ServingRecipe, settings: Settings, store: Store
) -> Deployment:
    """Serve a version's package under its public name; what served before serves again if anything goes wrong.

    Raises ForgeError saying why the new version does not serve. The alias champion moves last.
    """
    served = Served(name=version.name, version=version.version, uri=version.uri, digest=version.digest)
    why = f"{evaluation.verdict}: {evaluation.reason}"
    with tag_on_failure(served, settings):
        package, manifest = open_package(version.uri, version.digest, settings, store)
        candidate = Candidate(served, package, manifest, store.path(evaluation.uri), evaluation.champion, why)
    return serve(candidate, recipe, settings, store)


def serve(candidate: Candidate, recipe: ServingRecipe, settings: Settings, store: Store) -> Deployment:
    """Try a candidate, and make it the champion; ForgeError where it was undone, and why.

    Where it fails, its version is tagged with the reason, and is no challenger any more.
    """
    started = time.time()
    served = candidate.served
    after_error: list[str] = []

    def undone(trial: Trial, error: BaseException) -> bool:
        """Tag the version first: whoever is killed after it leaves a trial, which the reconciler ends."""
        try:
            promoted = is_promoted(store, trial)
        except ForgeError:
            promoted = True  # the store is away; whoever ends the trial will know
        if promoted:
            after_error.append("its promotion is recorded, and the reconciler finishes it")
            return False
        tag_failed(settings, served.name, served.version, _reason(error))
        return True

    before: Serving | None = None
    with terminate_as_interrupt():
        try:
            with contextlib.ExitStack() as stack:
                with tag_on_failure(served, settings):
                    target, recovery = open_target(settings), Recovery(lambda: store, settings)
                    beginning = active_rollout(
                        target.document, served, candidate.champion, recovery, undone, recipe.startup_timeout
                    )
                    trial = stack.enter_context(beginning)
                before = trial.trial.before
                deployment = _try(candidate, trial, target, recipe, settings, store)
        except TrialLost:
            raise  # whoever has ended it has seen to all else
        except ForgeError as error:
            if before is not None and not after_error:
                after_error.append(wait_until_as_before(target, before, recipe.startup_timeout))
            raise ForgeError("\n".join([error.message, *after_error])) from None
    agreed = f"; {deployment.agreement} answers as in evaluation" if deployment.agreement else ""
    log.info(f"{served.name} version {served.version} {_action(deployment)}{agreed}")
    return deployment.model_copy(update={"started": started, "seconds": time.time() - started})


@contextlib.contextmanager
def tag_on_failure(served: Served, settings: Settings) -> Iterator[None]:
    """What goes wrong before there is a trial: the version is tagged with the reason, and is no challenger any more."""
    try:
        yield
    except BaseException as error:
        tag_failed(settings, served.name, served.version, _reason(error))
        raise


def _reason(error: BaseException) -> str:
    return error.message if isinstance(error, ForgeError) else BROKEN_OFF


def _try(
    candidate: Candidate, trial: ActiveRollout, target: Target, recipe: ServingRecipe, settings: Settings, store: Store
) -> Deployment:
    """Load, prove, move the public name, watch, promote."""
    served, before = candidate.served, trial.trial.before
    _check_champion(candidate, settings)
    after, fit = state_after_rollout(
        before, served, candidate.manifest, recipe, settings, lambda base: base_config_and_size(base, store)
    )
    if fit:
        log.info(fit)
    watch = Watch(target.endpoint, served.name, _prompts(candidate, recipe))
    was = before.find(served.name)
    unchanged = after == before
    measured = None if unchanged or was is None else watch.measure()
    instead = f" in place of version {was.version}" if was else ""
    log.info(f"{served.versioned} is loaded, to be {served.name}{instead}")
    desired = trial.change(loading_state(before, after))
    target.ensure()
    there = functools.partial(_is_there, after)
    wait_for(target, desired, served, there, recipe.startup_timeout, trial.check)
    log.info(f"{served.versioned} is there, and is asked what evaluation asked")
    agreement = prove(target.endpoint, served.versioned, candidate.evaluation, recipe, trial.check)
    started = time.monotonic()
    desired = trial.change(after)
    wait_for(
        target, desired, served, lambda actual: actual.names.get(served.name) == served.versioned,
        recipe.startup_timeout, trial.check,
    )  # fmt: skip
    swapped = time.monotonic() - started
    now: Latency | None = None
    if not unchanged:
        log.info(f"{served.name} is {served.versioned} now, watched for {recipe.watch_seconds:.0f} s")
        now = watch.watch(served.versioned, measured, recipe, trial.check)
    why = candidate.why + (f"; {agreement} answers as in evaluation" if agreement else "")
    tag_failed(settings, served.name, served.version, "")
    trial.renew()
    promote(open_registry(settings), store, served.name, served.version, candidate.champion, why, trial.trial.id)
    trial.finish()
    restarted = (before.base, before.engine) != (after.base, after.engine)
    return Deployment(
        endpoint=target.endpoint,
        name=served.name,
        version=served.version,
        digest=served.digest,
        agreement=agreement,
        how="unchanged" if unchanged else _how(candidate, restarted),
        previous=was.version if was else "",
        previous_digest=was.digest if was else "",
        swap_seconds=0.0 if unchanged else swapped,
        latency_before=measured.probe if measured else None,
        latency_after=now.probe if now else None,
    )


def wait_for(
    target: Target,
    desired: Desired,
    served: Served,
    reached: Callable[[Actual], bool],
    timeout: float,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Wait until the reconciler has come so far; ForgeError where what is to be served cannot be, or in time.

    `check` raises what ends the wait.
    """
    deadline = time.monotonic() + timeout
    told = ""
    names = {served.versioned, *([desired.serving.base.versioned] if desired.serving.base else [])}
    while True:
        check()
        actual = target.status()
        if actual is None:
            target.ensure()  # it was killed
        else:
            if actual.generation >= desired.generation:
                if reached(actual):
                    return
                for name in sorted(names & set(actual.failed)):
                    raise ForgeError(f"{name} cannot be served: {actual.failed[name]}")
            if actual.waiting not in ("", told):
                told = actual.waiting
                log.info(told)
        if time.monotonic() > deadline:
            raise ForgeError(
                f"{served.versioned} did not serve within {timeout:.0f} s ({told or 'the reconciler does not answer'})"
                "; raise serving.startup_timeout, or fix what it waits for"
            )
        time.sleep(POLL)


def wait_until_as_before(target: Target, before: Serving, timeout: float) -> str:
    """Wait until what served before serves again; returns a line that says so, or why not."""
    names = ", ".join(f"{name} ({versioned})" for name, versioned in sorted(before.names.items()))
    if before.base is None:
        return "nothing was served before, and nothing is now"
    try:
        desired, _ = target.document.read()
        if desired.serving != before:
            return "something else serves now"
        target.ensure()
        wait_for(target, desired, before.base, lambda actual: actual.names == before.names, timeout)
    except ForgeError as worse:
        return f"{names} could not be served again: {worse.message}"
    return f"{names} serves again; the champion is unchanged"


def _is_there(after: Serving, actual: Actual) -> bool:
    """Whether the base and its adapters answer under their versioned names."""
    base = after.base.versioned if after.base else ""
    return actual.base == base and {one.versioned for one in after.adapters} <= set(actual.loaded)


def _check_champion(candidate: Candidate, settings: Settings) -> None:
    """The gate compared with a champion; ForgeError where another one has taken its place since."""
    served = candidate.served
    with translate_mlflow_errors(f"the champion of {served.name} cannot be read", settings):
        champion = find_champion(open_registry(settings), served.name)
    now = "" if champion is None else champion.version
    if now not in (candidate.champion, served.version):
        raise not_the_champion(served.name, served.version, candidate.champion, now)


def _prompts(candidate: Candidate, recipe: ServingRecipe) -> list[list[dict[str, Any]]]:
    if candidate.evaluation is None:
        return []
    return [row["messages"] for row in read_replay(candidate.evaluation, recipe.replay)]


def _how(candidate: Candidate, restarted: bool) -> Any:
    if restarted:
        return "weights"
    return "adapter" if candidate.manifest.get("kind") == ADAPTER else "name"


def _action(deployment: Deployment) -> str:
    if deployment.how == "unchanged":
        return "was serving already"
    instead = f" in place of version {deployment.previous}" if deployment.previous else ""
    return f"serves{instead} after {deployment.swap_seconds:.1f} s"


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, so that a half-done rollout is undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
