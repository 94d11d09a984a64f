"""Rollouts in progress: one at a time, and never left half-done.

A rollout starts by writing its trial into the document of the desired state, with what serves at that moment, and
renews the trial while its process lives. On an error or a signal the process undoes its own rollout. After SIGKILL or
the loss of a machine the renewals stop, and the reconciler or the next rollout ends the trial (`Recovery`). A record of
the promotion in the store decides how: if there is one, the rollout is finished; if not, it is undone.
"""

import contextlib
import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from forge.core.errors import ForgeError
from forge.core.processes import is_alive, this_process
from forge.core.settings import Settings
from forge.registry.mlflow_registry import champion_version, open_registry, translate_mlflow_errors
from forge.registry.promotion import drop_challenger, finish_promotion, promotions
from forge.serving.desired import Conflict, Desired, DesiredStore, RolloutState, Served, Serving, Trial
from forge.storage import Store
from forge.storage.lease import current_owner, earlier_attempt

log = logging.getLogger(__name__)

RENEWAL = 10.0  # seconds between renewals
ABANDONED = 45.0  # seconds without a renewal after which a rollout counts as interrupted
POLL = 0.5  # seconds
FAILED = "rollout_failed"  # the tag of a version whose rollout failed; its value is the reason
INTERRUPTED = "the rollout was interrupted before its version became the champion"


class TrialLost(ForgeError):
    """Another process has ended our rollout, because it took us for dead. It has also undone or finished it."""


class ActiveRollout:
    """Our trial in the document. Once another process has ended it, every write and `check` raise TrialLost.

    `not_undone` says why a rollout that failed was left to recovery.
    """

    def __init__(self, document: DesiredStore, trial: Trial) -> None:
        self.document, self.trial = document, trial
        self.ended = threading.Event()
        self.not_undone = ""
        self._lost: TrialLost | None = None
        self._lock = threading.Lock()

    def reached(self, state: RolloutState) -> None:
        """Log a new state. The document shows it from the next write on, which is a renewal at the latest."""
        self.trial = self.trial.model_copy(update={"state": state})
        log.info(f"{self.trial.of.versioned}: {state}")

    def change(self, serving: Serving) -> Desired:
        """Change what should be served."""
        return self._write(lambda desired: desired.model_copy(update={"serving": serving}))

    def finish(self, serving: Serving | None = None) -> Desired:
        """End the trial, with what should be served now or with another state of the server."""
        self.ended.set()
        changes = {"trial": None} if serving is None else {"trial": None, "serving": serving}
        return self._write(lambda desired: desired.model_copy(update=changes), renew=False)

    def renew(self) -> None:
        """Show that this process lives, and which state it has reached."""
        self._write(lambda desired: desired, count=0)

    def keep_renewing(self) -> None:
        """Renew until the trial has ended. A renewal that fails is tried again."""
        while self._lost is None and not self.ended.wait(RENEWAL):
            with contextlib.suppress(ForgeError, OSError):
                self.renew()

    def check(self) -> None:
        """Raise TrialLost if a renewal has found that the trial has ended. Reads nothing, so it can be called often."""
        if self._lost is not None:
            raise self._lost

    def lost(self) -> TrialLost | None:
        """The error if another process has ended the trial; None if it is ours, or the document can't be read now."""
        with contextlib.suppress(ForgeError, OSError):
            self.renew()
        return self._lost

    def _write(self, change: Callable[[Desired], Desired], renew: bool = True, count: int = 1) -> Desired:
        with self._lock:
            while True:
                desired, revision = self.document.read()
                if desired.trial is None or desired.trial.id != self.trial.id:
                    self._lost = TrialLost(
                        f"another process has ended the rollout of {self.trial.of.versioned}",
                        where=self.document.where,
                        fix="run again",
                    )
                    raise self._lost
                changed = change(desired)
                if renew:
                    renewal = {"renewals": desired.trial.renewals + 1, "state": self.trial.state}
                    changed = changed.model_copy(update={"trial": desired.trial.model_copy(update=renewal)})
                changed = changed.model_copy(update={"generation": desired.generation + count})
                with contextlib.suppress(Conflict):
                    self.document.write(changed, revision)
                    return changed


class Recovery:
    """Finds interrupted rollouts, and ends them.

    Our own operating system shows whether a process of this machine is alive. An earlier attempt of this Flyte task is
    known to be dead. Any other process is taken for dead when its renewals stop, measured by our own clock, so that the
    machines' clocks need not agree.
    """

    def __init__(self, store: Callable[[], Store], settings: Settings) -> None:
        self.store, self.settings = store, settings
        self._seen: tuple[str, int] = ("", 0)
        self._since = 0.0

    def __call__(self, document: DesiredStore) -> bool:
        """End the rollout in the document if it was interrupted; returns whether it was."""
        trial = document.read()[0].trial
        return (
            trial is not None and self.interrupted(trial) and recover(document, self.store(), self.settings, trial.id)
        )

    def interrupted(self, trial: Trial) -> bool:
        """Whether the process of a rollout is dead, or hasn't renewed its trial for too long."""
        alive = is_alive(trial.process)
        if alive is not None:
            return not alive
        if earlier_attempt(trial.owner):
            return True
        if (trial.id, trial.renewals) != self._seen:
            self._seen, self._since = (trial.id, trial.renewals), time.monotonic()
        return time.monotonic() - self._since > ABANDONED


@contextlib.contextmanager
def active_rollout(
    document: DesiredStore, of: Served, champion: str, recovery: Recovery, timeout: float
) -> Iterator[ActiveRollout]:
    """Start a rollout of a version, keep it renewed, and undo it on any error, Ctrl-C and SIGTERM included.

    ForgeError if another rollout is in progress and doesn't end within `timeout` seconds. If another process ends our
    trial, that is the cause of whatever fails afterwards, and TrialLost is raised instead.
    """
    with tagged_on_failure(of, recovery.settings):
        rollout = _start(document, of, champion, recovery, timeout)
    try:
        threading.Thread(target=rollout.keep_renewing, daemon=True).start()
        yield rollout
    except BaseException as error:
        if not rollout.ended.is_set() and not isinstance(error, TrialLost):
            _end_after_error(rollout, error, recovery)
        raise
    finally:
        rollout.ended.set()


def _start(document: DesiredStore, of: Served, champion: str, recovery: Recovery, timeout: float) -> ActiveRollout:
    """Write a new trial into the document, once no other rollout is in progress."""
    deadline = time.monotonic() + timeout
    while True:
        desired, revision = document.read()
        if desired.trial is None:
            trial = Trial(
                id=uuid.uuid4().hex, name=of.name, of=of, before=desired.serving, champion=champion,
                owner=current_owner(), process=this_process(),
            )  # fmt: skip
            started = desired.model_copy(update={"trial": trial, "generation": desired.generation + 1})
            with contextlib.suppress(Conflict):
                document.write(started, revision)
                rollout = ActiveRollout(document, trial)
                rollout.reached(RolloutState.STARTED)
                return rollout
        elif not recovery(document):
            if time.monotonic() > deadline:
                other = f"{desired.trial.of.versioned} ({desired.trial.state}), started by {desired.trial.owner}"
                raise ForgeError(
                    f"another rollout, of {other}, has been in progress for {timeout:.0f} s",
                    fix="find out what it waits for, and run again",
                )
            time.sleep(POLL)


def _end_after_error(rollout: ActiveRollout, error: BaseException, recovery: Recovery) -> None:
    """Undo our rollout, unless another process has ended it, or its promotion is recorded or may be."""
    if lost := rollout.lost():
        if isinstance(error, Exception):  # a signal is raised as it is
            raise lost from error
        return
    try:
        if is_promoted(recovery.store(), rollout.trial):
            rollout.not_undone = "its promotion is recorded, and the reconciler finishes the rollout"
            return
    except ForgeError as problem:
        rollout.not_undone = f"the reconciler will end the rollout, since its history can't be read: {problem.message}"
        return
    with contextlib.suppress(ForgeError):  # the trial is then still in the document, and recovery ends it
        undo(rollout.trial, reason_of(error), recovery.settings, rollout.finish)


def recover(document: DesiredStore, store: Store, settings: Settings, trial_id: str) -> bool:
    """End an interrupted rollout; returns False if it has ended already.

    If its promotion is recorded, the rollout is finished, unless the alias has been moved elsewhere since. Otherwise it
    is undone. Only the promotion's lease is written to the store, since the reconciler may write nothing else.
    """
    desired, revision = document.read()
    trial = desired.trial
    if trial is None or trial.id != trial_id:
        return False
    end = functools.partial(_end_unless_changed, document, desired, revision)
    if is_promoted(store, trial) and finish_promotion(open_registry(settings), store, trial.name, trial.id):
        tag_failed(settings, trial.name, trial.of.version, "")
        end(desired.serving)
        log.info(f"{trial.of.versioned}: finished an interrupted rollout")
    else:
        undo(trial, INTERRUPTED, settings, end)
    return True


def undo(trial: Trial, reason: str, settings: Settings, end: Callable[[Serving], object]) -> None:
    """Undo a rollout from whichever state it has reached: tag its version with the reason, then restore what served.

    `end` ends the trial with the given state of the server. The tag comes first: if this process is killed before
    `end`, the trial is still in the document, and recovery undoes it again.
    """
    tag_failed(settings, trial.name, trial.of.version, reason)
    end(trial.before)
    log.info(f"{trial.of.versioned}: undone, from the state {trial.state}")


def _end_unless_changed(document: DesiredStore, desired: Desired, revision: str, serving: Serving) -> None:
    """End the trial of another process, unless the document has changed since it was read."""
    ended = Desired(generation=desired.generation + 1, serving=serving)
    with contextlib.suppress(Conflict):  # ended by another process, or renewed
        document.write(ended, revision)


def is_promoted(store: Store, trial: Trial) -> bool:
    """Whether this rollout has recorded the promotion of its version."""
    return any(past.trial == trial.id for past in promotions(store, trial.name))


@contextlib.contextmanager
def tagged_on_failure(served: Served, settings: Settings) -> Iterator[None]:
    """Tag the version with the reason if something fails before its rollout has started."""
    try:
        yield
    except BaseException as error:
        tag_failed(settings, served.name, served.version, reason_of(error))
        raise


def reason_of(error: BaseException) -> str:
    """The reason for a failed rollout, from the error that ended it."""
    return error.message if isinstance(error, ForgeError) else INTERRUPTED


def tag_failed(settings: Settings, name: str, version: str, reason: str) -> None:
    """Tag a version with the reason why its rollout failed, and drop its alias challenger; "" removes the tag.

    A champion whose repeated rollout was interrupted isn't tagged. If MLflow can't be reached, its error is logged.
    """
    try:
        client = open_registry(settings)
        with translate_mlflow_errors(f"{name} version {version} could not be tagged", settings):
            tags = client.get_model_version(name, version).tags
            if reason == INTERRUPTED and champion_version(client, name) == version:
                reason = ""
            if reason:
                client.set_model_version_tag(name, version, FAILED, reason[:4000])
                drop_challenger(client, name, version)
            elif FAILED in tags:
                client.delete_model_version_tag(name, version, FAILED)
    except ForgeError as error:
        log.warning(error.message)
