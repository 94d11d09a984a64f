"""A rollout under way: one at a time, renewed while its process lives, and undone by whoever finds it broken off.

A promotion's record in the store is what decides whether a trial that was broken off is finished or undone: if the
version became the champion, what it serves stays; if not, what served before serves again.
"""

import contextlib
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
from forge.serving.desired import Conflict, Desired, DesiredStore, Served, Serving, Trial
from forge.storage import Store
from forge.storage.lease import current_owner, earlier_attempt

log = logging.getLogger(__name__)

RENEWED = 10.0  # seconds between renewals
ABANDONED = 45.0  # seconds without a renewal after which a trial counts as broken off
POLL = 0.5  # seconds
FAILED = "rollout_failed"  # the tag of a version that could not be rolled out: why
BROKEN_OFF = "the rollout was broken off before the version had become the champion"


class TrialLost(ForgeError):
    """Somebody else has ended our trial, and has seen to all that was to be given back."""


class ActiveRollout:
    """Our trial in the document. Once somebody else has ended it, all methods raise Ended."""

    def __init__(self, document: DesiredStore, trial: Trial) -> None:
        self.document, self.trial = document, trial
        self.ended = threading.Event()
        self._lost: TrialLost | None = None
        self._lock = threading.Lock()

    def change(self, serving: Serving) -> Desired:
        """Change what should be served, and go on."""
        return self._write(lambda desired: desired.model_copy(update={"serving": serving}))

    def finish(self, serving: Serving | None = None) -> Desired:
        """End the trial with what is served now, or with another state."""
        self.ended.set()
        more = {} if serving is None else {"serving": serving}
        return self._write(lambda desired: desired.model_copy(update={"trial": None, **more}), renew=False)

    def renew(self) -> None:
        """Say that we live."""
        self._write(lambda desired: desired, count=0)

    def keep_renewing(self) -> None:
        """Renew until the trial has ended, by us or by somebody else; what else goes wrong is tried again."""
        while self._lost is None and not self.ended.wait(RENEWED):
            with contextlib.suppress(ForgeError, OSError):
                self.renew()

    def check(self) -> None:
        """Go on, unless a renewal has found that the trial has ended: asks nobody, so that it can be called often."""
        if self._lost is not None:
            raise self._lost

    def gone(self) -> TrialLost | None:
        """Why the trial is no longer ours; None where it is, or where the document can't be read now."""
        with contextlib.suppress(ForgeError, OSError):
            self.renew()
        return self._lost

    def _write(self, change: Callable[[Desired], Desired], renew: bool = True, count: int = 1) -> Desired:
        with self._lock:
            while True:
                desired, revision = self.document.read()
                if desired.trial is None or desired.trial.id != self.trial.id:
                    self._lost = TrialLost(
                        f"{self.document.where}: somebody else has ended the rollout of {self.trial.of.versioned}: "
                        "its trial is no longer there; run again"
                    )
                    raise self._lost
                changed = change(desired)
                if renew:
                    alive = desired.trial.model_copy(update={"renewals": desired.trial.renewals + 1})
                    changed = changed.model_copy(update={"trial": alive})
                changed = changed.model_copy(update={"generation": desired.generation + count})
                with contextlib.suppress(Conflict):
                    self.document.write(changed, revision)
                    return changed


@contextlib.contextmanager
def active_rollout(
    document: DesiredStore,
    of: Served,
    champion: str,
    recover: Callable[[DesiredStore], bool],
    undone: Callable[[Trial, BaseException], bool],
    timeout: float,
) -> Iterator[ActiveRollout]:
    """Begin a trial, after the one under way has ended; on an error, what served before should be served again.

    `undone` is given an error first, and says whether it is to be undone: where the version's promotion was recorded
    already, the trial stays in the document, for `recover` to finish it.

    ForgeError where another rollout goes on for `timeout` seconds. A trial that was broken off is ended first. Where
    somebody else has ended ours, whatever goes wrong after that comes of it: Ended is raised instead.
    """
    deadline = time.monotonic() + timeout
    while True:
        desired, revision = document.read()
        if desired.trial is None:
            trial = Trial(
                id=uuid.uuid4().hex, name=of.name, of=of, before=desired.serving, champion=champion,
                owner=current_owner(), process=this_process(),
            )  # fmt: skip
            begun = desired.model_copy(update={"trial": trial, "generation": desired.generation + 1})
            with contextlib.suppress(Conflict):
                document.write(begun, revision)
                break
        elif not recover(document):
            if time.monotonic() > deadline:
                raise ForgeError(
                    f"another rollout, of {desired.trial.of.versioned} by {desired.trial.owner}, has gone on for "
                    f"{timeout:.0f} s; see what it does"
                )
            time.sleep(POLL)
    ours = ActiveRollout(document, trial)
    try:
        threading.Thread(target=ours.keep_renewing, daemon=True).start()
        yield ours
    except BaseException as error:
        if not ours.ended.is_set() and not isinstance(error, TrialLost):
            if gone := ours.gone():
                if isinstance(error, Exception):  # a signal goes on as one
                    raise gone from error
            elif undone(trial, error):
                with contextlib.suppress(ForgeError):  # whoever finds the trial ends it
                    ours.finish(trial.before)
        raise
    finally:
        ours.ended.set()


class Recovery:
    """Finds trials that were broken off, and ends them.

    A trial whose process can be seen from here is known by it, and one of an earlier attempt of this Flyte task by its
    owner; any other by its renewals, watched for a while by our own watch, so that no clocks need to agree.
    """

    def __init__(self, store: Callable[[], Store], settings: Settings) -> None:
        self.store, self.settings = store, settings
        self._seen: tuple[str, int] = ("", 0)
        self._since = 0.0

    def __call__(self, document: DesiredStore) -> bool:
        """End the trial in a document if it was broken off; returns whether it was."""
        trial = document.read()[0].trial
        return trial is not None and self.broken_off(trial) and recover(document, self.store(), self.settings, trial.id)

    def broken_off(self, trial: Trial) -> bool:
        """Whether nobody carries a trial on."""
        alive = is_alive(trial.process)
        if alive is not None:
            return not alive
        if earlier_attempt(trial.owner):
            return True
        if (trial.id, trial.renewals) != self._seen:
            self._seen, self._since = (trial.id, trial.renewals), time.monotonic()
        return time.monotonic() - self._since > ABANDONED


def recover(document: DesiredStore, store: Store, settings: Settings, trial_id: str) -> bool:
    """End a trial that was broken off; returns whether it was still there.

    Where the version's promotion was recorded, it is finished, unless somebody has moved the alias elsewhere since.
    Else what served before should be served again, the version is tagged with the reason, and is no challenger any
    more. The store is only read, but for the promotion's lease: the reconciler may not write more.
    """
    desired, revision = document.read()
    trial = desired.trial
    if trial is None or trial.id != trial_id:
        return False
    promoted = is_promoted(store, trial) and finish_promotion(open_registry(settings), store, trial.name, trial.id)
    tag_failed(settings, trial.name, trial.of.version, "" if promoted else BROKEN_OFF)
    ended = Desired(generation=desired.generation + 1, serving=desired.serving if promoted else trial.before)
    with contextlib.suppress(Conflict):  # somebody else has ended it
        document.write(ended, revision)
    return True


def is_promoted(store: Store, trial: Trial) -> bool:
    """Whether the version's promotion was recorded in this trial."""
    return any(past.trial == trial.id for past in promotions(store, trial.name))


def tag_failed(settings: Settings, name: str, version: str, reason: str) -> None:
    """Record in MLflow why a version is not served ("" where it is); a failed one is no challenger any more.

    Without MLflow, the reason is printed alone.
    """
    try:
        client = open_registry(settings)
        with translate_mlflow_errors(f"{name} version {version} could not be tagged", settings):
            tags = client.get_model_version(name, version).tags
            if reason == BROKEN_OFF and champion_version(client, name) == version:
                reason = ""  # it is the champion, and was only to be served again
            if reason:
                client.set_model_version_tag(name, version, FAILED, reason[:4000])
                drop_challenger(client, name, version)
            elif FAILED in tags:
                client.delete_model_version_tag(name, version, FAILED)
    except ForgeError as error:
        log.info(f"{error.message}")
