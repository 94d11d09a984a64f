"""Makes what is served what should be: the loop beside vLLM. It keeps nothing that it could not find again.

Killed at any moment, it goes on where the document and vLLM itself say that things stand. It loads adapters under
versioned names, leads public names to what is there, and unloads what nobody wants any more once its requests have
ended. See docs/serving.md.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forge.core.errors import ForgeError
from forge.serving.desired import Actual, Desired, DesiredStore, Failed, Served, Server, Serving
from forge.serving.vllm_client import UNREACHABLE, VLLM, Names
from forge.storage import write_atomically

FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0  # seconds until something that failed is tried again; doubled each time
RECOVERY = "a rollout that was broken off"
NOTHING = "nothing to serve"


@dataclass
class Failure:
    """Why something cannot be served, and when it is tried again (monotonic time)."""

    reason: str
    wait: float
    again: float


class Reconciler:
    """One step at a time from what is served to what should be.

    `fetch` gives the verified local directory of something to serve, and `release` lets go of it; `recover` is given a
    document, and ends its trial if that was broken off (forge/serving/trial.py). `names_file` is what vLLM's middleware
    reads.
    """

    def __init__(
        self,
        document: DesiredStore,
        server: Server,
        fetch: Callable[[Served], Path],
        release: Callable[[Served], None],
        recover: Callable[[DesiredStore], bool],
        names_file: Path,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.document, self.server, self.recover = document, server, recover
        self.fetch, self.release = fetch, release
        self.names_file, self.tell = names_file, tell
        self.vllm = VLLM(server.url)
        self.desired: Desired | None = None  # as it was read last
        self.actual = Actual()
        self.counts = Names()
        self.loads, self.load_seconds = 0, 0.0  # adapters that vLLM has loaded, and the time that it took
        self.failures: dict[str, Failure] = {}
        self._told = ""
        self._paths: dict[str, tuple[Served, Path]] = {}

    def step(self) -> Actual:
        """Bring what is served nearer to the document; returns how far it has come."""
        desired, _ = self.document.read()
        self.desired = desired
        if desired.trial is not None and self._may_try(RECOVERY):
            try:
                if self.recover(self.document):
                    desired, _ = self.document.read()
                    self.desired = desired
            except ForgeError as error:  # MLflow or the store is away: what serves is seen to all the same
                self.tell(f"{RECOVERY} cannot be ended yet: {error.message}")
                self._failed(RECOVERY, error)
        if desired.generation != self.actual.generation:
            wanted = {one.versioned for one in self._wanted(desired)}
            self.failures = {name: failure for name, failure in self.failures.items() if name in {*wanted, RECOVERY}}
            for name in self._paths.keys() - wanted:
                self.release(self._paths.pop(name)[0])
        self.actual = self._step(desired)
        told = self.actual.waiting or f"as desired: {json.dumps(self.actual.names)}"
        if told != self._told:
            self._told = told
            self.tell(told)
        return self.actual

    def _step(self, desired: Desired) -> Actual:
        serving = desired.serving
        if serving.base is None:
            self._lead(desired, [])
            self.server.stop()
            return Actual(generation=desired.generation, waiting=NOTHING)
        base = serving.base
        waiting = f"{base.versioned} to be tried again"
        if self._may_try(base.versioned):
            try:
                waiting = self.server.ensure(base, str(self._fetched(base)), serving.engine)
            except (Failed, ForgeError) as error:
                self._failed(base.versioned, error)
        live: list[str] = []
        if not waiting:
            found = self._live()
            if found is None:  # busy, or just dead: names stay where they lead until `ensure` knows
                return self.actual.model_copy(update={"waiting": "vLLM does not answer at the moment"})
            live = found
            self.failures.pop(base.versioned, None)
        names = self._lead(desired, live)
        if base.versioned in live:
            live = self._load(serving, live)
            names = self._lead(desired, live)
            live = self._unload(desired, live, names)
        else:
            waiting = waiting or f"vLLM does not serve {base.versioned} yet"
        missing = [one.versioned for one in serving.adapters if one.versioned not in live]
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
        """The versioned names that vLLM answers to now; None where it does not answer."""
        try:
            return self.vllm.models()
        except UNREACHABLE:
            return None

    def _fetched(self, one: Served) -> Path:
        """Where it is on this machine, verified once by this process."""
        if one.versioned not in self._paths or not self._paths[one.versioned][1].is_dir():
            self.actual = self.actual.model_copy(update={"waiting": f"fetching {one.uri}"})
            self.tell(self.actual.waiting)
            self._paths[one.versioned] = one, self.fetch(one)
            self.tell(f"{one.uri} is fetched and verified")
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
                continue  # vLLM has ended meanwhile
        return live

    def _lead(self, desired: Desired, live: list[str]) -> dict[str, str]:
        """Lead public names to what is live; returns those that lead somewhere.

        A name stays where it leads until what it should lead to is live. If that is not live either, it leads nowhere,
        which clients are told as 503: come again soon. So are names that a rollout with a new base is to move later.
        """
        before = desired.trial.before.names if desired.trial else {}
        now = self._led()
        names: dict[str, str | None] = {}
        for name, versioned in {**before, **desired.serving.names}.items():
            names[name] = next((one for one in (versioned, now.get(name)) if one in live), None)
        text = json.dumps({"names": names}, indent=2, sort_keys=True)
        if not self.names_file.is_file() or self.names_file.read_text() != text:
            write_atomically(self.names_file, text, durable=False)  # vLLM, which reads it, does not outlive one either
        return {name: versioned for name, versioned in names.items() if versioned is not None}

    def _led(self) -> dict[str, str | None]:
        """Where names lead by the file that the middleware reads; nowhere where it is not whole."""
        try:
            return dict(json.loads(self.names_file.read_text())["names"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _unload(self, desired: Desired, live: list[str], names: dict[str, str]) -> list[str]:
        """Unload the adapters that nobody wants and that answer nobody; returns what is live then."""
        try:
            self.counts = self.vllm.names()
        except UNREACHABLE:
            return live
        if {name: to for name, to in self.counts.names.items() if to is not None} != names:
            return live  # the middleware does not lead as we wrote it: nobody knows what is still asked for
        wanted = {one.versioned for one in self._wanted(desired)} | set(names.values())
        for versioned in [name for name in live if name not in wanted]:
            counts = self.counts.versions.get(versioned)
            if counts is None or counts.in_flight == 0:
                try:
                    self.vllm.unload(versioned)
                except UNREACHABLE:
                    continue
                self.tell(f"unloaded {versioned}")
                live = [name for name in live if name != versioned]
        return live

    @staticmethod
    def _wanted(desired: Desired) -> list[Served]:
        """All that stays loaded: while a rollout is under way, also what it would go back to."""
        states = [desired.serving, *([desired.trial.before] if desired.trial else [])]
        return [one for state in states for one in state.all()]

    def _may_try(self, what: str) -> bool:
        failure = self.failures.get(what)
        return failure is None or time.monotonic() >= failure.again

    def _failed(self, what: str, error: Exception) -> None:
        before = self.failures.get(what)
        wait = min(2 * before.wait, LONGEST_WAIT) if before else FIRST_WAIT
        reason = error.message if isinstance(error, ForgeError) else str(error)
        self.failures[what] = Failure(reason, wait, time.monotonic() + wait)


def run(
    reconciler: Reconciler, poll: float, ended: Callable[[], bool], after: Callable[[], None], forever: bool
) -> None:
    """Step until `ended`, or, unless `forever`, until nothing is to be served. `after` is called after each step, and
    the next one comes in `poll` seconds, or when the document is seen to have changed.

    Whatever goes wrong in a step is told, and tried again: on a laptop nobody would start this process again.
    """
    last = ""
    while not ended():
        try:
            actual = reconciler.step()
            last = ""
        except Exception as error:
            reason = error.message if isinstance(error, ForgeError) else f"{type(error).__name__}: {error}"
            if reason != last:
                reconciler.tell(f"will be tried again: {reason}")
            last = reason
            after()
            time.sleep(1.0)
            continue
        after()
        if actual.waiting == NOTHING and not forever:
            return
        reconciler.document.wait(poll)
