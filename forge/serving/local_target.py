"""Serving on this machine: the document is a file, and the reconciler a process that outlives the command."""

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
from forge.core.processes import last_lines, start_ticks
from forge.core.settings import PREFIX, PROJECT, Settings
from forge.core.signals import signals_deferred
from forge.serving.desired import Actual, Conflict, Desired, DesiredStore, read_document, revision_of
from forge.serving.vllm_client import UNREACHABLE
from forge.storage import write_atomically

POLL = 0.01  # seconds between checks whether the document has been replaced
STARTUP = 60.0  # seconds until a reconciler answers: mostly Python's imports
SHUTDOWN = 90.0  # seconds until it exits: it may wait for vLLM to drain


class FileDocument:
    """The document as a file in the settings' home. Its revision is the digest of its text."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.serving / "desired.json"
        self.where = str(self.path)
        self._read = self._stat()  # at the last read

    def read(self) -> tuple[Desired, str]:
        """See forge.serving.desired.DesiredStore."""
        self._read = self._stat()
        if not self.path.exists():
            return Desired(), ""
        text = self.path.read_text(encoding="utf-8")
        return read_document(text, self.where), revision_of(text)

    def write(self, desired: Desired, revision: str) -> None:
        """See forge.serving.desired.DesiredStore."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if self.read()[1] != revision:
                raise Conflict
            write_atomically(self.path, desired.model_dump_json(indent=2) + "\n")

    def wait(self, seconds: float) -> None:
        """See forge.serving.desired.DesiredStore."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._stat() == self._read:
            time.sleep(POLL)

    def _stat(self) -> tuple[int, ...]:
        """Changes whenever the file is replaced; () if it does not exist."""
        try:
            stat = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return ()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


class LocalTarget:
    """This machine's vLLM, as a rollout sees it; starts and stops its reconciler."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.document: DesiredStore = FileDocument(settings)
        self.endpoint = settings.endpoint
        self.record = settings.serving / "reconciler.json"
        self.log = settings.serving / "reconciler.log"

    def status(self) -> Actual | None:
        """See forge.serving.targets.Target."""
        recorded = self._recorded()
        if not self._is_process(recorded):
            return None  # another program may use its port by now
        try:
            answer = urllib3.request("GET", f"http://127.0.0.1:{recorded['port']}/status", retries=False, timeout=5)
            return Actual.model_validate_json(answer.data)
        except UNREACHABLE:
            return None

    def ensure(self) -> None:
        """Start the reconciler if none runs, and wait until it answers; ForgeError with its log if it doesn't.

        A reconciler with other settings or other code is replaced.
        """
        deadline = time.monotonic() + STARTUP
        if self._runs() and self._recorded().get("version", "") != reconciler_version(self.settings):
            self.stop()
        process = None
        while self.status() is None:
            if process is not None and process.poll() not in (None, 0) and not self._runs():
                raise ForgeError(f"the reconciler exited during startup:\n{last_lines(self.log)}")
            if time.monotonic() > deadline:
                raise ForgeError(f"the reconciler does not answer after {STARTUP:.0f} s", fix=f"see {self.log}")
            if not self._runs() and (process is None or process.poll() is not None):
                process = self._start()
            time.sleep(0.1)

    def stop(self) -> bool:
        """Stop the reconciler, with SIGKILL if it takes too long; vLLM continues. Returns whether one was running."""
        was_running = self._runs()
        with signals_deferred():
            signalled = None
            deadline = time.monotonic() + SHUTDOWN
            while self._runs():
                recorded = self._recorded()  # read again: a reconciler that has just started records itself a bit later
                late = time.monotonic() > deadline
                if self._is_process(recorded) and (recorded != signalled or late):
                    os.kill(recorded["pid"], signal.SIGKILL if late else signal.SIGTERM)
                    signalled = recorded
                time.sleep(0.05)
        return was_running

    def _recorded(self) -> dict[str, Any]:
        """The reconciler's record: pid, start ticks, port and version; empty if there is none."""
        try:
            return dict(json.loads(self.record.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    @staticmethod
    def _is_process(recorded: dict[str, Any]) -> bool:
        """Whether the recorded process is alive, and not another one that has its PID by now."""
        return "pid" in recorded and start_ticks(recorded["pid"]) == recorded.get("ticks")

    def _runs(self) -> bool:
        """Whether a reconciler holds the lock. The kernel releases it when the process dies."""
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
    """This process's environment variables, with the settings as given."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return others | settings_environment(settings)


def settings_environment(settings: Settings) -> dict[str, str]:
    """The settings that differ from their defaults, as environment variables."""
    variables = {}
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if value != field.default and value is not None:
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            variables[PREFIX + name.upper()] = str(plain)
    return variables


def reconciler_version(settings: Settings) -> str:
    """A digest of a reconciler's settings and code: it has to be restarted when they change."""
    return digest_json([settings_environment(settings), code_version("forge.serving")])


def reconciler_lock(settings: Settings) -> Path:
    """The lock that the one reconciler of this home holds for as long as it lives."""
    return settings.serving / "reconciler.lock"
