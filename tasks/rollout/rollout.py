"""Rolls out a version: from a registered challenger to the champion that serves under the public name.

A rollout is a state machine. `TRANSITIONS` lists the steps in order, each with the state that it reaches:

    started -> loaded -> proved -> switched -> watched -> promoted

`active_rollout` starts it. On an error, Ctrl-C or SIGTERM in any state it also undoes it: the version is tagged with
the reason, and what served before serves again. From the moment that the promotion is recorded in the store, an
interrupted rollout is finished instead. After SIGKILL, the reconciler or the next rollout does either.
"""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge.core.contracts import Deployment, Evaluation, Version
from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.core.settings import Settings
from forge.core.signals import sigterm_as_interrupt
from forge.registry.mlflow_registry import find_champion, open_registry, translate_mlflow_errors
from forge.registry.packages import ADAPTER, open_package
from forge.registry.promotion import not_the_champion, promote
from forge.serving.desired import RolloutState, Served, Serving
from forge.serving.plan import loading_state
from forge.serving.rollout_check import state_after_rollout
from forge.serving.served_files import base_config_and_size
from forge.serving.targets import Target, open_target
from forge.serving.trial import ActiveRollout, Recovery, TrialLost, active_rollout, tag_failed, tagged_on_failure
from forge.storage import Store
from tasks.rollout.prove import prove, read_replay
from tasks.rollout.wait import is_loaded, is_switched, wait_for, wait_until_restored
from tasks.rollout.watch import Latency, Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """The version to serve: its package, manifest and evaluation (None if it is missing).

    `champion` is the version that the gate compared it with ("" for none). `why` goes into the record of its promotion.
    """

    served: Served
    package: Path
    manifest: dict[str, Any]
    evaluation: Path | None
    champion: str
    why: str


@dataclass
class Rollout:
    """A rollout in progress, and what its steps have measured. `after` is the state of the server that it aims for."""

    candidate: Candidate
    recipe: ServingRecipe
    settings: Settings
    store: Store
    target: Target
    trial: ActiveRollout
    after: Serving
    watch: Watch
    latency_before: Latency | None = None
    latency_after: Latency | None = None
    agreement: str = ""
    switch_seconds: float = 0.0

    @property
    def served(self) -> Served:
        """The version to serve."""
        return self.candidate.served

    @property
    def before(self) -> Serving:
        """The state of the server to go back to."""
        return self.trial.trial.before

    @property
    def unchanged(self) -> bool:
        """Whether the version serves under the public name already."""
        return self.after == self.before


def roll_out(
    version: Version, evaluation: Evaluation, recipe: ServingRecipe, settings: Settings, store: Store
) -> Deployment:
    """Serve a registered version under its public name, and make it the champion.

    Raises ForgeError with the reason if it fails; then what served before serves again.
    """
    served = Served(name=version.name, version=version.version, uri=version.uri, digest=version.digest)
    with tagged_on_failure(served, settings):
        package, manifest = open_package(version.uri, version.digest, settings, store)
        candidate = Candidate(
            served, package, manifest, store.path(evaluation.uri), evaluation.champion, evaluation.reason
        )
    return serve(candidate, recipe, settings, store)


def serve(candidate: Candidate, recipe: ServingRecipe, settings: Settings, store: Store) -> Deployment:
    """Run all steps of a rollout; if one fails, undo it and raise ForgeError with the reason and what serves now.

    A version that fails is tagged with the reason, and is no longer the challenger.
    """
    started = time.time()
    served = candidate.served
    trial: ActiveRollout | None = None
    with sigterm_as_interrupt():
        with tagged_on_failure(served, settings):
            target, recovery = open_target(settings), Recovery(lambda: store, settings)
        try:
            with active_rollout(target.document, served, candidate.champion, recovery, recipe.startup_timeout) as trial:
                rollout = _prepare(candidate, recipe, settings, store, target, trial)
                for transition, state in TRANSITIONS:
                    transition(rollout)
                    trial.reached(state)
                trial.finish()
        except TrialLost:
            raise  # the process that ended the trial has also restored what served before
        except ForgeError as error:
            if trial is None:  # it has not started
                raise
            now = trial.not_undone or wait_until_restored(target, trial.trial.before, recipe.startup_timeout)
            raise ForgeError(f"{error.message}\n{now}") from None
    deployment = _deployment(rollout)
    agreed = f"; {deployment.agreement} answers as in evaluation" if deployment.agreement else ""
    log.info(f"{served.name} version {served.version} {_action(deployment)}{agreed}")
    return deployment.model_copy(update={"started": started, "seconds": time.time() - started})


def _prepare(
    candidate: Candidate, recipe: ServingRecipe, settings: Settings, store: Store, target: Target, trial: ActiveRollout
) -> Rollout:
    """Work out the state of the server after the rollout, and measure what serves now."""
    _check_champion(candidate, settings)
    before = trial.trial.before
    after, fit = state_after_rollout(
        before, candidate.served, candidate.manifest, recipe, settings, lambda base: base_config_and_size(base, store)
    )
    if fit:
        log.info(fit)
    watch = Watch(target.endpoint, candidate.served.name, _prompts(candidate, recipe))
    rollout = Rollout(candidate, recipe, settings, store, target, trial, after, watch)
    if not rollout.unchanged and before.find(candidate.served.name):
        rollout.latency_before = watch.measure()
    return rollout


def _load(rollout: Rollout) -> None:
    """Load the version under its versioned name, next to what serves now where that is possible."""
    desired = rollout.trial.change(loading_state(rollout.before, rollout.after))
    rollout.target.ensure()
    loaded = functools.partial(is_loaded, rollout.after)
    wait_for(rollout.target, desired, rollout.served, loaded, rollout.recipe.startup_timeout, rollout.trial.check)


def _prove(rollout: Rollout) -> None:
    """Replay prompts of the evaluation over the API, under the versioned name."""
    rollout.agreement = prove(
        rollout.target.endpoint,
        rollout.served.versioned,
        rollout.candidate.evaluation,
        rollout.recipe,
        rollout.trial.check,
    )


def _switch(rollout: Rollout) -> None:
    """Point the public name to the version."""
    started = time.monotonic()
    desired = rollout.trial.change(rollout.after)
    switched = functools.partial(is_switched, rollout.served)
    wait_for(rollout.target, desired, rollout.served, switched, rollout.recipe.startup_timeout, rollout.trial.check)
    rollout.switch_seconds = time.monotonic() - started


def _watch(rollout: Rollout) -> None:
    """Watch errors and latency under the public name, unless the version served there before."""
    if not rollout.unchanged:
        rollout.latency_after = rollout.watch.watch(
            rollout.served.versioned, rollout.latency_before, rollout.recipe, rollout.trial.check
        )


def _promote(rollout: Rollout) -> None:
    """Record the version as the champion, and move the alias."""
    candidate, served, trial = rollout.candidate, rollout.served, rollout.trial
    why = candidate.why + (f"; {rollout.agreement} answers as in evaluation" if rollout.agreement else "")
    tag_failed(rollout.settings, served.name, served.version, "")
    trial.renew()
    client = open_registry(rollout.settings)
    promote(client, rollout.store, served.name, served.version, candidate.champion, why, trial.trial.id)


TRANSITIONS: tuple[tuple[Callable[[Rollout], None], RolloutState], ...] = (
    (_load, RolloutState.LOADED),
    (_prove, RolloutState.PROVED),
    (_switch, RolloutState.SWITCHED),
    (_watch, RolloutState.WATCHED),
    (_promote, RolloutState.PROMOTED),
)


def _check_champion(candidate: Candidate, settings: Settings) -> None:
    """ForgeError if the champion isn't the version that the gate compared the candidate with."""
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


def _deployment(rollout: Rollout) -> Deployment:
    """The result of a finished rollout."""
    served, previous = rollout.served, rollout.before.find(rollout.served.name)
    return Deployment(
        endpoint=rollout.target.endpoint,
        name=served.name,
        version=served.version,
        digest=served.digest,
        agreement=rollout.agreement,
        how=_how(rollout),
        previous=previous.version if previous else "",
        previous_digest=previous.digest if previous else "",
        swap_seconds=0.0 if rollout.unchanged else rollout.switch_seconds,
        latency_before=rollout.latency_before.probe if rollout.latency_before else None,
        latency_after=rollout.latency_after.probe if rollout.latency_after else None,
    )


def _how(rollout: Rollout) -> Literal["adapter", "weights", "name", "unchanged"]:
    before, after = rollout.before, rollout.after
    if rollout.unchanged:
        return "unchanged"
    if (before.base, before.engine) != (after.base, after.engine):
        return "weights"
    return "adapter" if rollout.candidate.manifest.get("kind") == ADAPTER else "name"


def _action(deployment: Deployment) -> str:
    if deployment.how == "unchanged":
        return "was serving already"
    previous = f" in place of version {deployment.previous}" if deployment.previous else ""
    return f"serves{previous} after {deployment.swap_seconds:.1f} s"
