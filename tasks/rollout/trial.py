"""A rollout under way: one at a time, renewed while its process lives, and undone by whoever finds it broken off.

A promotion's record in the store is what decides whether a trial that was broken off is finished or undone: if the
version became the champion, what it serves stays; if not, what served before serves again.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

from tasks.errors import ForgeError
from tasks.promotion import promote, promotions
from tasks.registry import open_registry, telling
from tasks.rollout.desired import Conflict, Desired, Document, Served, Serving, Trial
from tasks.rollout.server import start_ticks
from tasks.settings import Settings
from tasks.storage import Store
from tasks.storage.lease import whoami

RENEWED = 10.0  # seconds between renewals
ABANDONED = 45.0  # seconds without a renewal after which a trial counts as broken off
POLL = 0.5  # seconds
FAILED = "rollout_failed"  # the tag of a version that could not be rolled out: why
BROKEN_OFF = "the rollout was broken off before the version had become the champion"


class Trying:
    """Our trial in the document."""

    def __init__(self, document: Document, trial: Trial) -> None:
        self.document, self.trial = document, trial
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def change(self, serving: Serving) -> Desired:
        """Change what should be served, and go on; ForgeError where the trial is no longer ours."""
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
        """Renew until the trial has ended; what goes wrong is tried again, and seen by the next change."""
        while not self.ended.wait(RENEWED):
            with contextlib.suppress(ForgeError, OSError):
                self.renew()

    def _write(self, change: Callable[[Desired], Desired], renew: bool = True, count: int = 1) -> Desired:
        with self._lock:
            while True:
                desired, revision = self.document.read()
                if desired.trial is None or desired.trial.process != self.trial.process:
                    raise ForgeError(
                        f"{self.document.where}: the rollout of {self.trial.of.versioned} was ended by somebody else, "
                        "since it had not been heard of; run again"
                    )
                changed = change(desired)
                if renew:
                    alive = desired.trial.model_copy(update={"until": time.time() + ABANDONED})
                    changed = changed.model_copy(update={"trial": alive})
                changed = changed.model_copy(update={"generation": desired.generation + count})
                with contextlib.suppress(Conflict):
                    self.document.write(changed, revision)
                    return changed


@contextlib.contextmanager
def trying(
    document: Document, of: Served, champion: str, recover: Callable[[Document], bool], timeout: float
) -> Iterator[Trying]:
    """Begin a trial, after the one under way has ended; on an error, what served before should be served again.

    ForgeError where another rollout goes on for `timeout` seconds. A trial that was broken off is ended first.
    """
    deadline = time.monotonic() + timeout
    while True:
        desired, revision = document.read()
        if desired.trial is None:
            trial = Trial(
                name=of.name, of=of, before=desired.serving, champion=champion, owner=whoami(), process=this_process(),
                until=time.time() + ABANDONED,
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
    ours = Trying(document, trial)
    renewing = threading.Thread(target=ours.keep_renewing, daemon=True)
    renewing.start()
    try:
        yield ours
    except BaseException:
        with contextlib.suppress(ForgeError):  # ended by somebody else: undone already
            ours.finish(trial.before)
        raise
    finally:
        ours.ended.set()


def broken_off(trial: Trial) -> bool:
    """Whether nobody carries a trial on: its process on this machine has ended, or it was not renewed."""
    host, pid, ticks = trial.process.split("/")
    if host == socket.gethostname() and start_ticks(int(pid)) != int(ticks):
        return True
    return time.time() > trial.until


def this_process() -> str:
    """This process, told from all others: host/number/start."""
    return f"{socket.gethostname()}/{os.getpid()}/{start_ticks(os.getpid())}"


def recover(document: Document, store: Store, settings: Settings) -> bool:
    """End a trial that was broken off; returns whether there was one.

    Where the version's promotion was recorded, it is made whole. Else what served before should be served again, and
    the version is tagged with the reason.
    """
    desired, revision = document.read()
    trial = desired.trial
    if trial is None or not broken_off(trial):
        return False
    promoted = is_promoted(store, trial)
    if promoted:
        promote(open_registry(settings), store, trial.name, trial.of.version, trial.champion, "a rollout made whole")
    ended = Desired(generation=desired.generation + 1, serving=desired.serving if promoted else trial.before)
    try:
        document.write(ended, revision)
    except Conflict:
        return True
    if not promoted:
        tag_failed(settings, trial.name, trial.of.version, BROKEN_OFF)
    return True


def is_promoted(store: Store, trial: Trial) -> bool:
    """Whether the version became the champion in this trial."""
    history = promotions(store, trial.name)
    return bool(history) and history[-1].version == trial.of.version != trial.champion


def tag_failed(settings: Settings, name: str, version: str, reason: str) -> None:
    """Tell the registry why a version is not served ("" where it is); without MLflow, it is printed alone."""
    try:
        client = open_registry(settings)
        with telling(f"{name} version {version} could not be tagged", settings):
            tags = client.get_model_version(name, version).tags
            if reason:
                client.set_model_version_tag(name, version, FAILED, reason[:4000])
            elif FAILED in tags:
                client.delete_model_version_tag(name, version, FAILED)
    except ForgeError as error:
        print(f"roll_out: {error.message}", flush=True)
