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

import psutil

from forge.core.contracts import Engine
from forge.core.errors import ForgeError
from forge.core.processes import start_ticks
from forge.core.settings import PROJECT, Settings
from forge.serving.desired import Failed, Served
from forge.serving.engine import DRAIN, MODULE, NAMES, VARIABLES, arguments, on_cpu
from forge.serving.vllm_client import VLLM
from forge.serving.vllm_environment import vllm_environment
from forge.storage import write_atomically

STOP_GRACE = DRAIN + 10.0  # seconds between asking the server to stop and killing it
UNHEALTHY = 120.0  # seconds after which a server that answers no more is ended, and started again
STARTUP = 1800.0  # the same for one that has not answered yet: large weights take their time
STARTING = "vLLM is starting, which takes up to a minute; its log is {}"


@dataclass(frozen=True)
class ServerSpec:
    """What a server was started with: the base (its versioned name) in the directory `path`, options, and a port."""

    base: str
    path: str
    options: list[str]
    port: int


@dataclass(frozen=True)
class RunningServer:
    """A started server: its log, and its process, told from a later one of the same number by its start.

    The process leads a session, which its children share. `ticks` is the start in clock ticks since boot, which no
    change of the clock moves.
    """

    spec: ServerSpec
    pid: int
    ticks: int
    log: str

    def alive(self) -> bool:
        """Whether the server's process lives."""
        return start_ticks(self.pid) == self.ticks

    def processes(self) -> list[psutil.Process]:
        """The processes of the server's session that live, whether or not the first of them does."""
        there = processes_in(Path(self.log).parent)
        found = []
        for process in there:
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == self.pid:
                    found.append(process)
        return found


class LocalServer:
    """The one vLLM server of this home, started by its reconciler alone (which holds `reconciler.lock`)."""

    def __init__(self, settings: Settings, grace: float = STOP_GRACE) -> None:
        self.settings, self.grace = settings, grace
        self.url = f"http://127.0.0.1:{settings.serving_port}"
        self.record = settings.serving / "server.json"
        self.names_file = settings.serving / "names.json"
        self._starting: RunningServer | None = None  # what this process has started, and has not seen healthy yet
        self._seen = time.monotonic()  # when it was healthy last, or was started

    def ensure(self, base: Served, path: str, engine: Engine) -> str:
        """See forge.serving.desired.Server."""
        options = [*arguments(base, path, engine), *on_cpu(path, engine)]
        spec = ServerSpec(base.versioned, path, options, self.settings.serving_port)
        recorded = self.recorded()
        if recorded is None or recorded.spec != spec:
            self.stop()
            if not port_is_free(spec.port):
                raise Failed(f"port {spec.port} is in use by another program; stop it, or set FORGE_SERVING_PORT")
            return STARTING.format(self.start(spec).log)
        if not recorded.alive():
            self.stop()  # what it left
            if recorded == self._starting:
                raise Failed(
                    f"vLLM ended while it started:\n{last_lines(recorded.log)}\nThe whole log is {recorded.log}"
                )
            return f"vLLM had ended, and is started again; the log of its end is {self.start(spec).log}.before"
        healthy = VLLM(self.url).healthy()
        if healthy:
            self._starting, self._seen = None, time.monotonic()
            return ""
        if time.monotonic() - self._seen > (STARTUP if recorded == self._starting else UNHEALTHY):
            self.stop(grace=0)
            raise Failed(f"vLLM does not answer, and was ended; its log is {recorded.log}")
        if healthy is False:  # it ends by itself then, within seconds
            return f"vLLM's engine has ended; its log is {recorded.log}"
        # One that was ready and does not answer at the moment is busy, and is left alone.
        return STARTING.format(recorded.log) if recorded == self._starting else ""

    def running(self) -> RunningServer | None:
        """The recorded server, if its process lives."""
        recorded = self.recorded()
        return recorded if recorded is not None and recorded.alive() else None

    def recorded(self) -> RunningServer | None:
        """The server that was started last and not stopped, alive or not."""
        try:
            value = json.loads(self.record.read_text())
            return RunningServer(ServerSpec(**value.pop("spec")), **value)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError):
            raise ForgeError(
                f"{self.record} is broken; end vLLM by hand if it runs (pgrep -f {MODULE}), and delete the file"
            ) from None

    def start(self, spec: ServerSpec) -> RunningServer:
        """Start a server and record it; returns at once, before it is ready. The log of the one before is kept."""
        self.settings.serving.mkdir(parents=True, exist_ok=True)
        log = self.settings.serving / f"vllm-{spec.base}.log"
        if log.exists():
            log.replace(f"{log}.before")
        command = [str(self.settings.serving_python), "-m", MODULE, "--host", "127.0.0.1", "--port", str(spec.port)]
        variables = {**VARIABLES, NAMES: str(self.names_file), "PYTHONPATH": str(PROJECT)}  # for the middleware
        with signals_deferred(), log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *spec.options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=vllm_environment(**variables),
                cwd=self.settings.serving,
                start_new_session=True,
            )
            running = RunningServer(spec, process.pid, start_ticks(process.pid) or 0, str(log))
            write_atomically(self.record, json.dumps(asdict(running), indent=2))
        self._starting, self._seen = running, time.monotonic()
        return running

    def stop(self, grace: float | None = None) -> RunningServer | None:
        """Stop the recorded server and all its processes, after `grace` seconds by force; returns what was running."""
        grace = self.grace if grace is None else grace
        running, recorded = self.running(), self.recorded()
        with signals_deferred():
            if running is not None:
                os.kill(running.pid, signal.SIGTERM)
            left = {*self._strays(), *(recorded.processes() if recorded else [])}
            _, alive = psutil.wait_procs(list(left), timeout=grace if running else 0)
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(alive, timeout=STOP_GRACE)
            self.record.unlink(missing_ok=True)
        return running

    def _strays(self) -> list[psutil.Process]:
        """vLLM's processes in this home: also of a server whose starter was killed before it had recorded it."""
        sessions: dict[int, list[psutil.Process]] = {}
        ours = set()
        for process in processes_in(self.settings.serving):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                session = os.getsid(process.pid)
                sessions.setdefault(session, []).append(process)
                if any(word in " ".join(process.cmdline()) for word in (MODULE, "VLLM::")):
                    ours.add(session)
        return [process for session in ours for process in sessions[session]]


def processes_in(directory: Path) -> list[psutil.Process]:
    """The processes that were started in a directory, but for this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()) == directory.resolve():
                found.append(process)
    return found


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
        handler = handlers[signal.Signals(pending[0])]
        if not callable(handler):
            raise KeyboardInterrupt
        handler(pending[0], None)


def last_lines(log: str, count: int = 12) -> str:
    return "\n".join(f"  {line}" for line in Path(log).read_text(errors="replace").splitlines()[-count:])
