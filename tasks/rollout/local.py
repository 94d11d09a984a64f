"""Serving on this machine: the document is a file, and its reconciler a process that outlives who started it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import urllib3
from filelock import FileLock, Timeout

from tasks.errors import ForgeError
from tasks.rollout.desired import Actual, Conflict, Desired, Document, read_document, revision_of
from tasks.rollout.server import last_lines, signals_deferred, start_ticks
from tasks.rollout.vllm_api import UNREACHABLE
from tasks.settings import PROJECT, Settings
from tasks.storage import write_atomically

STARTING = 60.0  # seconds until a reconciler answers: Python's imports, mostly


class FileDocument:
    """The document as a file of this home."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.serving / "desired.json"
        self.where = str(self.path)

    def read(self) -> tuple[Desired, str]:
        """See tasks.rollout.desired.Document."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return read_document(text, self.where), revision_of(text)

    def write(self, desired: Desired, revision: str) -> None:
        """See tasks.rollout.desired.Document."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if self.read()[1] != revision:
                raise Conflict
            write_atomically(self.path, desired.model_dump_json(indent=2) + "\n")


class LocalTarget:
    """What a rollout sees of this machine's serving."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.document: Document = FileDocument(settings)
        self.endpoint = settings.endpoint
        self.record = settings.serving / "reconciler.json"
        self.log = settings.serving / "reconciler.log"

    def status(self) -> Actual | None:
        """What the reconciler reports, or None where none answers."""
        try:
            recorded = json.loads(self.record.read_text())
            answer = urllib3.request("GET", f"http://127.0.0.1:{recorded['port']}/status", retries=False, timeout=5)
            return Actual.model_validate_json(answer.data)
        except (FileNotFoundError, KeyError, *UNREACHABLE):
            return None

    def ensure(self) -> None:
        """Start the reconciler if none runs, and wait until it answers; ForgeError with its log where it does not."""
        deadline = time.monotonic() + STARTING
        while self.status() is None:
            process = None if self._runs() else self._start()
            while self.status() is None:
                if process is not None and process.poll() is not None and process.returncode != 0:
                    raise ForgeError(f"the reconciler ended while it started:\n{last_lines(str(self.log))}")
                if not self._runs() and (process is None or process.poll() is not None):
                    break
                if time.monotonic() > deadline:
                    raise ForgeError(f"the reconciler does not answer after {STARTING:.0f} s; see {self.log}")
                time.sleep(0.1)

    def stop(self) -> bool:
        """End the reconciler; vLLM is left alone. Returns whether one ran."""
        if not self._runs():
            return False
        recorded = json.loads(self.record.read_text())
        with signals_deferred():
            if start_ticks(recorded["pid"]) == recorded["ticks"]:
                os.kill(recorded["pid"], signal.SIGTERM)
            deadline = time.monotonic() + 30
            while self._runs() and time.monotonic() < deadline:
                time.sleep(0.05)
            if start_ticks(recorded["pid"]) == recorded["ticks"]:
                os.kill(recorded["pid"], signal.SIGKILL)
        return True

    def _runs(self) -> bool:
        """Whether a reconciler holds its lock, which the kernel takes from it when it dies."""
        self.settings.serving.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(reconciler_lock(self.settings), timeout=0):
                return False
        except Timeout:
            return True

    def _start(self) -> "subprocess.Popen[bytes]":
        with signals_deferred(), self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "tasks.rollout", "reconcile"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT, start_new_session=True,
                env=environment(self.settings),
            )  # fmt: skip


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with the settings that decide what a reconciler of this home does."""
    given = {"FORGE_HOME": settings.home, "FORGE_SERVING_PORT": settings.serving_port, "FORGE_STORE": settings.store,
             "FORGE_SERVING_PYTHON": settings.serving_python}  # fmt: skip
    return os.environ | {name: str(value) for name, value in given.items()}


def reconciler_lock(settings: Settings) -> Path:
    """Held by the one reconciler of this home for as long as it lives."""
    return settings.serving / "reconciler.lock"
