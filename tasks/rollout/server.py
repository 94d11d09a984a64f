"""vLLM as a process on this machine: one server, recorded under .forge/serving/, that outlives who started it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

from tasks.errors import ForgeError
from tasks.settings import Settings
from tasks.storage import write_atomically
from tasks.vllm_environment import saved_dtype, vllm_environment

STOP_GRACE = 20.0  # seconds between asking the server to stop and killing it
DIRECT = build_opener(ProxyHandler({}))  # no proxy leads to this machine
VLLM = "vllm.entrypoints.openai.api_server"


@dataclass(frozen=True)
class Spec:
    """What a server serves: the package at `path`, in its own dtype, under the model name `name`, on `port`."""

    name: str
    version: str
    digest: str
    path: str
    port: int


@dataclass(frozen=True)
class Running:
    """A started server: its log, and its process, told from a later one of the same number by its start.

    The process leads a session, which its children share. `ticks` is the start in clock ticks since boot, which no
    change of the clock moves.
    """

    spec: Spec
    pid: int
    ticks: int
    log: str

    def alive(self) -> bool:
        """Whether the server's process lives."""
        return start_ticks(self.pid) == self.ticks

    def processes(self) -> list[psutil.Process]:
        """The processes of the server's session that live, whether or not the first of them does."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(pid) == self.pid and (start_ticks(pid) or 0) >= self.ticks:
                    found.append(psutil.Process(pid))
        return found

    def healthy(self) -> bool:
        """Whether the server answers that it is healthy."""
        try:
            with DIRECT.open(f"http://127.0.0.1:{self.spec.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False


class LocalServer:
    """The one vLLM server of this home. Callers hold the rollout lock (`Settings.serving / "lock"`)."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.record = settings.serving / "server.json"

    def running(self) -> Running | None:
        """The recorded server, if its process lives."""
        recorded = self.recorded()
        return recorded if recorded is not None and recorded.alive() else None

    def recorded(self) -> Running | None:
        """The server that was started last and not stopped, alive or not."""
        try:
            value = json.loads(self.record.read_text())
            return Running(Spec(**value.pop("spec")), **value)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError):
            raise ForgeError(
                f"{self.record} is broken; end vLLM by hand if it runs (pgrep -f {VLLM}), and delete the file"
            ) from None

    def start(self, spec: Spec) -> Running:
        """Start a server and record it; returns at once, before it is ready."""
        self.settings.serving.mkdir(parents=True, exist_ok=True)
        log = self.settings.serving / f"vllm-{spec.digest[:12]}.log"
        command = [
            str(self.settings.serving_python),
            "-m",
            VLLM,
            "--host",
            "127.0.0.1",
            "--port",
            str(spec.port),
            "--model",
            spec.path,
            "--served-model-name",
            spec.name,
            "--dtype",
            saved_dtype(Path(spec.path)),
            "--enforce-eager",
        ]
        with signals_deferred(), log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=vllm_environment(),
                cwd=self.settings.serving,
                start_new_session=True,
            )
            running = Running(spec, process.pid, start_ticks(process.pid) or 0, str(log))
            write_atomically(self.record, json.dumps(asdict(running), indent=2))
        return running

    def wait_ready(self, running: Running, timeout: float) -> None:
        """Wait until the server is healthy; ForgeError with the end of its log when it ends or takes too long."""
        deadline = time.monotonic() + timeout
        while not running.healthy():
            if not running.alive():
                raise ForgeError(
                    f"vLLM ended while it started:\n{_last_lines(running.log)}\nThe whole log is {running.log}"
                )
            if time.monotonic() > deadline:
                raise ForgeError(
                    f"vLLM was not ready after {timeout:.0f} s; raise serving.startup_timeout, or see {running.log}"
                )
            time.sleep(0.25)

    def stop(self, grace: float = STOP_GRACE) -> Running | None:
        """Stop the recorded server and all its processes, after `grace` seconds by force; returns what was running."""
        running, recorded = self.running(), self.recorded()
        with signals_deferred():
            if recorded is not None and (processes := recorded.processes()):
                if running is not None:
                    os.kill(running.pid, signal.SIGTERM)
                _, alive = psutil.wait_procs(processes, timeout=grace if running else 0)
                for process in alive:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(alive, timeout=STOP_GRACE)
            self.record.unlink(missing_ok=True)
        return running


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended. See stat in proc(5)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back for a moment in which a process must not be lost; raise KeyboardInterrupt after."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    pending: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    handlers = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt


def _last_lines(log: str, count: int = 12) -> str:
    return "\n".join(f"  {line}" for line in Path(log).read_text(errors="replace").splitlines()[-count:])
