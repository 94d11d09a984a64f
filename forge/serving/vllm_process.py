"""vLLM as a process on this machine: one server, recorded under .forge/serving/, that outlives its reconciler."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from forge.core.contracts import Engine
from forge.core.errors import ForgeError
from forge.core.processes import last_lines, start_ticks
from forge.core.settings import PROJECT, Settings
from forge.core.signals import signals_deferred
from forge.serving.desired import Failed, Served
from forge.serving.engine import DRAIN, MODULE, NAMES, VARIABLES, arguments, on_cpu
from forge.serving.vllm_client import VLLM
from forge.serving.vllm_environment import vllm_environment
from forge.storage import write_atomically

STOP_GRACE = DRAIN + 10.0  # seconds between SIGTERM and SIGKILL
UNHEALTHY = 120.0  # seconds without an answer after which a server is killed and started again
STARTUP = 1800.0  # the same for a server that has not answered yet: large weights take long to load
STARTING = "vLLM is starting, which takes up to a minute; its log is {}"


@dataclass(frozen=True)
class ServerSpec:
    """What a server is started with: the base (its versioned name), its directory, vLLM's options, and the port."""

    base: str
    path: str
    options: list[str]
    port: int


@dataclass(frozen=True)
class RunningServer:
    """A server that was started. Its process leads a session, to which its child processes belong too.

    `ticks` is the process's start in clock ticks since boot, which tells it from a later process with the same PID.
    """

    spec: ServerSpec
    pid: int
    ticks: int
    log: str

    def alive(self) -> bool:
        """Whether the server's process is alive."""
        return start_ticks(self.pid) == self.ticks

    def processes(self) -> list[psutil.Process]:
        """The live processes of the server's session, even if the server itself is dead."""
        found = []
        for process in processes_in(Path(self.log).parent):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == self.pid:
                    found.append(process)
        return found


class LocalServer:
    """The one vLLM server of this home. Only the reconciler, which holds `reconciler.lock`, starts it."""

    def __init__(self, settings: Settings, grace: float = STOP_GRACE) -> None:
        self.settings, self.grace = settings, grace
        self.url = f"http://127.0.0.1:{settings.serving_port}"
        self.record = settings.serving / "server.json"
        self.names_file = settings.serving / "names.json"
        self._starting: RunningServer | None = None  # started by this process, and not yet healthy
        self._last_seen = time.monotonic()  # when it was last healthy, or was started

    def ensure(self, base: Served, path: str, engine: Engine) -> str:
        """See forge.serving.desired.Server."""
        options = [*arguments(base, path, engine), *on_cpu(path, engine)]
        spec = ServerSpec(base.versioned, path, options, self.settings.serving_port)
        recorded = self.recorded()
        if recorded is None or recorded.spec != spec:
            return self._replace(spec)
        if not recorded.alive():
            return self._restart(recorded)
        return self._progress(recorded)

    def running(self) -> RunningServer | None:
        """The recorded server, if its process is alive."""
        recorded = self.recorded()
        return recorded if recorded is not None and recorded.alive() else None

    def recorded(self) -> RunningServer | None:
        """The server that was last started and hasn't been stopped, dead or alive."""
        try:
            value = json.loads(self.record.read_text(encoding="utf-8"))
            return RunningServer(ServerSpec(**value.pop("spec")), **value)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError):
            raise ForgeError(
                "not a valid record of a vLLM server",
                where=str(self.record),
                fix=f"stop vLLM by hand if it runs (pgrep -f {MODULE}), and delete the file",
            ) from None

    def start(self, spec: ServerSpec) -> RunningServer:
        """Start a server and record it, without waiting until it is ready. The previous log is kept as .before."""
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
        self._starting, self._last_seen = running, time.monotonic()
        return running

    def stop(self, grace: float | None = None) -> RunningServer | None:
        """Stop the recorded server and its processes, with SIGKILL after `grace` seconds; returns what was running."""
        grace = self.grace if grace is None else grace
        running, recorded = self.running(), self.recorded()
        with signals_deferred():
            if running is not None:
                os.kill(running.pid, signal.SIGTERM)
            processes = {*self._strays(), *(recorded.processes() if recorded else [])}
            _, alive = psutil.wait_procs(list(processes), timeout=grace if running else 0)
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(alive, timeout=STOP_GRACE)
            self.record.unlink(missing_ok=True)
        return running

    def _replace(self, spec: ServerSpec) -> str:
        """Stop whatever server runs, and start the one we need."""
        self.stop()
        if not port_is_free(spec.port):
            raise Failed(f"port {spec.port} is in use by another program; stop it, or set FORGE_SERVING_PORT")
        return STARTING.format(self.start(spec).log)

    def _restart(self, dead: RunningServer) -> str:
        """Start a dead server again. Raises Failed if it died during startup, since it would again."""
        self.stop()  # its child processes
        if dead == self._starting:
            log = Path(dead.log)
            raise Failed(f"vLLM exited during startup:\n{last_lines(log)}\nThe whole log is {log}")
        return f"vLLM had exited and is started again; its last log is {self.start(dead.spec).log}.before"

    def _progress(self, alive: RunningServer) -> str:
        """What a live server waits for; "" if it serves. Kills one that is silent for too long, and raises Failed."""
        healthy = VLLM(self.url).healthy()
        if healthy:
            self._starting, self._last_seen = None, time.monotonic()
            return ""
        if time.monotonic() - self._last_seen > (STARTUP if alive == self._starting else UNHEALTHY):
            self.stop(grace=0)
            raise Failed(f"vLLM does not answer, and was killed; its log is {alive.log}")
        if healthy is False:  # vLLM itself then exits within seconds
            return f"vLLM's engine has died; its log is {alive.log}"
        # A server that was ready and doesn't answer at the moment is busy.
        return STARTING.format(alive.log) if alive == self._starting else ""

    def _strays(self) -> list[psutil.Process]:
        """All vLLM processes of this home, also of a server that was started but not recorded before a SIGKILL."""
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
    """The processes whose working directory this is, apart from this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()) == directory.resolve():
                found.append(process)
    return found


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
