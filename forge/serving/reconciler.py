"""The reconciler: a loop next to vLLM that brings the actual state to the desired one, a step at a time.

Each step reads the document, makes sure that vLLM serves the base, loads missing adapters under their versioned names,
points public names to what is loaded, and unloads adapters that are no longer needed once their requests have ended. It
keeps no state of its own: after a crash it continues from what the document, vLLM and the names file say. It also ends
interrupted rollouts (trial.py). See docs/serving.md.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from forge.core.errors import ForgeError
from forge.serving.desired import Actual, Desired, DesiredStore, Failed, Served, Server, Serving
from forge.serving.vllm_client import UNREACHABLE, VLLM, Names
from forge.storage import write_atomically

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0  # seconds between attempts at what has failed; doubled each time
RECOVERY = "an interrupted rollout"
NOTHING = "nothing to serve"


@dataclass
class Failure:
    """Why an attempt failed, and the time of the next one (`retry_at`, monotonic)."""

    reason: str
    wait: float
    retry_at: float


class Reconciler:
    """Brings what is served to the desired state. `step` does the work; `run` repeats it.

    `fetch` returns the verified local directory of a model, and `release` ends its use. `recover` ends the rollout in a
    document if it was interrupted. `names_file` is read by the middleware in vLLM (aliases.py).
    """

    def __init__(
        self,
        document: DesiredStore,
        server: Server,
        fetch: Callable[[Served], Path],
        release: Callable[[Served], None],
        recover: Callable[[DesiredStore], bool],
        names_file: Path,
    ) -> None:
        self.document, self.server, self.recover = document, server, recover
        self.fetch, self.release = fetch, release
        self.names_file = names_file
        self.vllm = VLLM(server.url)
        self.desired: Desired | None = None  # as last read
        self.actual = Actual()
        self.counts = Names()
        self.loads, self.load_seconds = 0, 0.0  # adapters that vLLM has loaded, and the total time
        self.failures: dict[str, Failure] = {}
        self._logged = ""
        self._paths: dict[str, tuple[Served, Path]] = {}

    def step(self) -> Actual:
        """Take one step towards the desired state; returns the actual state after it."""
        desired = self._read()
        if desired.generation != self.actual.generation:
            self._forget_unneeded(desired)
        self.actual = self._reconcile(desired)
        line = self.actual.waiting or f"as desired: {json.dumps(self.actual.names)}"
        if line != self._logged:
            self._logged = line
            log.info(line)
        return self.actual

    def _read(self) -> Desired:
        """Read the document, after ending its rollout if that was interrupted."""
        self.desired, _ = self.document.read()
        if self.desired.trial is not None and self._may_try(RECOVERY):
            try:
                if self.recover(self.document):
                    self.desired, _ = self.document.read()
            except ForgeError as error:  # MLflow or the store can't be reached; serving continues without them
                log.warning(f"{RECOVERY} cannot be ended yet: {error.message}")
                self._failed(RECOVERY, error)
        return self.desired

    def _forget_unneeded(self, desired: Desired) -> None:
        """Drop failures and directories of models that a new generation of the document doesn't need."""
        needed = {one.versioned for one in _needed(desired)}
        self.failures = {name: failure for name, failure in self.failures.items() if name in {*needed, RECOVERY}}
        for name in self._paths.keys() - needed:
            self.release(self._paths.pop(name)[0])

    def _reconcile(self, desired: Desired) -> Actual:
        serving = desired.serving
        if serving.base is None:
            self._point_names(desired, [])
            self.server.stop()
            return Actual(generation=desired.generation, waiting=NOTHING)
        waiting = self._ensure_base(serving.base, serving)
        live: list[str] = []
        if not waiting:
            answer = self._live()
            if answer is None:  # busy, or it has just died: names stay until `ensure` knows which
                return self.actual.model_copy(update={"waiting": "vLLM does not answer at the moment"})
            live = answer
            self.failures.pop(serving.base.versioned, None)
        names = self._point_names(desired, live)
        if serving.base.versioned in live:
            live = self._load(serving, live)
            names = self._point_names(desired, live)
            live = self._unload(desired, live, names)
        else:
            waiting = waiting or f"vLLM does not serve {serving.base.versioned} yet"
        return self._report(desired, serving.base, live, names, waiting)

    def _ensure_base(self, base: Served, serving: Serving) -> str:
        """Make vLLM serve the base; returns what it waits for, "" once it serves."""
        waiting = f"{base.versioned} to be tried again"
        if self._may_try(base.versioned):
            try:
                waiting = self.server.ensure(base, str(self._fetched(base)), serving.engine)
            except (Failed, ForgeError) as error:
                self._failed(base.versioned, error)
        return waiting

    def _report(self, desired: Desired, base: Served, live: list[str], names: dict[str, str], waiting: str) -> Actual:
        missing = [one.versioned for one in desired.serving.adapters if one.versioned not in live]
        if not waiting and missing:
            waiting = f"{', '.join(missing)} to be loaded"
        failed = {name: failure.reason for name, failure in self.failures.items()}
        return Actual(
            generation=desired.generation,
            base=base.versioned if base.versioned in live else "",
            loaded=tuple(name for name in live if name != base.versioned),
            names=names,
            in_flight={name: counts.in_flight for name, counts in self.counts.versions.items()},
            failed=failed,
            waiting="; ".join(failed.values()) or waiting,
        )

    def _live(self) -> list[str] | None:
        """The versioned names that vLLM serves now; None if it doesn't answer."""
        try:
            return self.vllm.models()
        except UNREACHABLE:
            return None

    def _fetched(self, one: Served) -> Path:
        """The local directory of a model. This process downloads and verifies each model once."""
        if one.versioned not in self._paths or not self._paths[one.versioned][1].is_dir():
            self.actual = self.actual.model_copy(update={"waiting": f"fetching {one.uri}"})
            log.info(self.actual.waiting)
            self._paths[one.versioned] = one, self.fetch(one)
            log.info(f"{one.uri} is fetched and verified")
        return self._paths[one.versioned][1]

    def _load(self, serving: Serving, live: list[str]) -> list[str]:
        """Load the adapters that are missing; returns what is live then."""
        for one in serving.adapters:
            if one.versioned in live or not self._may_try(one.versioned):
                continue
            try:
                path = str(self._fetched(one))
                started = time.monotonic()
                self.vllm.load(one.versioned, path)
                self.loads, self.load_seconds = self.loads + 1, self.load_seconds + time.monotonic() - started
                live = [*live, one.versioned]
                self.failures.pop(one.versioned, None)
            except (Failed, ForgeError) as error:
                self._failed(one.versioned, error)
            except UNREACHABLE:
                continue  # vLLM has exited in the meantime
        return live

    def _point_names(self, desired: Desired, live: list[str]) -> dict[str, str]:
        """Point public names to what is live, in the names file; returns those that point to something.

        A name stays where it points until its new version is live. If neither is live it points to nothing, and the
        middleware answers clients with 503 and Retry-After. The same goes for names that moved with a rollout's old
        base and will point to its new one later.
        """
        before = desired.trial.before.names if desired.trial else {}
        now = self._current_names()
        names: dict[str, str | None] = {}
        for name, versioned in {**before, **desired.serving.names}.items():
            names[name] = next((one for one in (versioned, now.get(name)) if one in live), None)
        text = json.dumps({"names": names}, indent=2, sort_keys=True)
        if not self.names_file.is_file() or self.names_file.read_text(encoding="utf-8") != text:
            write_atomically(self.names_file, text, durable=False)  # its reader, vLLM, dies with the machine too
        return {name: versioned for name, versioned in names.items() if versioned is not None}

    def _current_names(self) -> dict[str, str | None]:
        """The public names in the names file; none if it is missing or invalid."""
        try:
            return dict(json.loads(self.names_file.read_text(encoding="utf-8"))["names"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _unload(self, desired: Desired, live: list[str], names: dict[str, str]) -> list[str]:
        """Unload adapters that are no longer needed and have no requests in flight; returns what is live then."""
        try:
            self.counts = self.vllm.names()
        except UNREACHABLE:
            return live
        if {name: to for name, to in self.counts.names.items() if to is not None} != names:
            return live  # the middleware hasn't read the names file yet: an old version may still get requests
        needed = {one.versioned for one in _needed(desired)} | set(names.values())
        for versioned in [name for name in live if name not in needed]:
            counts = self.counts.versions.get(versioned)
            if counts is None or counts.in_flight == 0:
                try:
                    self.vllm.unload(versioned)
                except UNREACHABLE:
                    continue
                log.info(f"unloaded {versioned}")
                live = [name for name in live if name != versioned]
        return live

    def _may_try(self, what: str) -> bool:
        failure = self.failures.get(what)
        return failure is None or time.monotonic() >= failure.retry_at

    def _failed(self, what: str, error: Exception) -> None:
        before = self.failures.get(what)
        wait = min(2 * before.wait, LONGEST_WAIT) if before else FIRST_WAIT
        self.failures[what] = Failure(_message(error), wait, time.monotonic() + wait)


def run(
    reconciler: Reconciler, poll: float, ended: Callable[[], bool], after: Callable[[], None], forever: bool
) -> None:
    """Step until `ended`, or, unless `forever`, until there is nothing to serve. `after` is called after each step.

    The next step follows after `poll` seconds, or as soon as the document is seen to have changed. Whatever a step
    raises is logged, and the step repeated: on a laptop, nothing would restart this process.
    """
    logged = ""
    while not ended():
        try:
            actual = reconciler.step()
            logged = ""
        except Exception as error:
            reason = _message(error)
            if reason != logged:
                log.warning(f"will be tried again: {reason}")
            logged = reason
            after()
            time.sleep(1.0)
            continue
        after()
        if actual.waiting == NOTHING and not forever:
            return
        reconciler.document.wait(poll)


def _needed(desired: Desired) -> Iterable[Served]:
    """The models to keep loaded, including those that a rollout in progress would go back to."""
    states = [desired.serving, *([desired.trial.before] if desired.trial else [])]
    return [one for state in states for one in state.all()]


def _message(error: Exception) -> str:
    if isinstance(error, ForgeError):
        return error.message
    return str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
