"""Serving on this machine: the document is a file, and its reconciler a process that outlives who started it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import urllib3
from filelock import FileLock, Timeout
from pydantic import SecretStr

from forge.core.code_version import code_version
from forge.core.digest import digest_json
from forge.core.errors import ForgeError
from forge.core.processes import start_ticks
from forge.core.settings import PREFIX, PROJECT, Settings
from forge.serving.desired import Actual, Conflict, Desired, DesiredStore, read_document, revision_of
from forge.serving.vllm_client import UNREACHABLE
from forge.serving.vllm_process import last_lines, signals_deferred
from forge.storage import write_atomically

LOOK = 0.01  # seconds between looks at whether the document has been replaced
STARTING = 60.0  # seconds until a reconciler answers: Python's imports, mostly
ENDING = 90.0  # seconds until it ends: it may be waiting for vLLM to end its requests


class FileDocument:
    """The document as a file of this home."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.serving / "desired.json"
        self.where = str(self.path)
        self._read = self._state()  # of what was read last

    def read(self) -> tuple[Desired, str]:
        """See forge.serving.desired.Document."""
        self._read = self._state()
        if not self.path.exists():
            return Desired(), ""
        text = self.path.read_text(encoding="utf-8")
        return read_document(text, self.where), revision_of(text)

    def write(self, desired: Desired, revision: str) -> None:
        """See forge.serving.desired.Document."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if self.read()[1] != revision:
                raise Conflict
            write_atomically(self.path, desired.model_dump_json(indent=2) + "\n")

    def wait(self, seconds: float) -> None:
        """See forge.serving.desired.Document."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._state() == self._read:
            time.sleep(LOOK)

    def _state(self) -> tuple[int, ...]:
        """What another file in its place has otherwise; () where there is none."""
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return ()
        return found.st_ino, found.st_mtime_ns, found.st_size


class LocalTarget:
    """What a rollout sees of this machine's serving."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.document: DesiredStore = FileDocument(settings)
        self.endpoint = settings.endpoint
        self.record = settings.serving / "reconciler.json"
        self.log = settings.serving / "reconciler.log"

    def status(self) -> Actual | None:
        """What the reconciler reports, or None where none answers."""
        try:
            recorded = json.loads(self.record.read_text())
            if start_ticks(recorded["pid"]) != recorded["ticks"]:
                return None  # its port may be another program's by now
            answer = urllib3.request("GET", f"http://127.0.0.1:{recorded['port']}/status", retries=False, timeout=5)
            return Actual.model_validate_json(answer.data)
        except (FileNotFoundError, KeyError, *UNREACHABLE):
            return None

    def ensure(self) -> None:
        """Start the reconciler if none runs, and wait until it answers; ForgeError with its log where it does not.

        One that was started with other settings, or by other code, is replaced.
        """
        deadline = time.monotonic() + STARTING
        if self._runs() and self._recorded().get("version", "") != reconciler_version(self.settings):
            self.stop()
        process = None
        while self.status() is None:
            if process is not None and process.poll() not in (None, 0) and not self._runs():
                raise ForgeError(f"the reconciler ended while it started:\n{last_lines(str(self.log))}")
            if time.monotonic() > deadline:
                raise ForgeError(f"the reconciler does not answer after {STARTING:.0f} s; see {self.log}")
            if not self._runs() and (process is None or process.poll() is not None):
                process = self._start()
            time.sleep(0.1)

    def stop(self) -> bool:
        """End the reconciler; vLLM is left alone. Returns whether one ran."""
        ran = self._runs()
        with signals_deferred():
            asked = None
            deadline = time.monotonic() + ENDING
            while self._runs():
                recorded = self._recorded()  # anew: one that has just been started records itself a moment later
                late = time.monotonic() > deadline
                if recorded and start_ticks(recorded["pid"]) == recorded["ticks"] and (recorded != asked or late):
                    os.kill(recorded["pid"], signal.SIGKILL if late else signal.SIGTERM)
                    asked = recorded
                time.sleep(0.05)
        return ran

    def _recorded(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.record.read_text()))
        except (FileNotFoundError, ValueError):
            return {}

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
                [sys.executable, "-m", "forge.serving", "reconcile"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT, start_new_session=True,
                env=reconciler_environment(self.settings),
            )  # fmt: skip


def reconciler_environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with these settings."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return others | settings_environment(settings)


def settings_environment(settings: Settings) -> dict[str, str]:
    """The settings that are not as they are by default, as variables."""
    found = {}
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if value != field.default and value is not None:
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            found[PREFIX + name.upper()] = str(plain)
    return found


def reconciler_version(settings: Settings) -> str:
    """A digest of what decides how a reconciler works: its settings, and the code."""
    return digest_json([settings_environment(settings), code_version("forge.serving")])


def reconciler_lock(settings: Settings) -> Path:
    """Held by the one reconciler of this home for as long as it lives."""
    return settings.serving / "reconciler.lock"
