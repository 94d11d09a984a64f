"""Real MLflow servers on loopback, on SQLite and on Postgres."""

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

POSTGRES = next(iter(sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)), "")
SOME_USER = "nobody"  # Postgres does not run as root


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URI of a new database."""
    home, port = Path(tempfile.mkdtemp(prefix="forge-postgres-")), free_port()
    user = SOME_USER if os.getuid() == 0 else None
    if user:
        shutil.chown(home, user)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": home, "user": user}
    data = home / "data"
    subprocess.run([f"{POSTGRES}/initdb", "-D", data, "-U", "forge", "-A", "trust", "--no-sync"], check=True, **quiet)
    options = ["-c", "listen_addresses=127.0.0.1", "-p", str(port), "-k", str(home), "-c", "fsync=off"]
    process = subprocess.Popen([f"{POSTGRES}/postgres", "-D", data, *options], **quiet)
    try:
        ready = [f"{POSTGRES}/pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        wait_until(lambda: subprocess.run(ready, **quiet).returncode == 0, process)
        yield f"postgresql://forge@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown
        process.wait(30)
        shutil.rmtree(home)


@contextlib.contextmanager
def mlflow_server(database: str, directory: Path, port: int = 0) -> Iterator[str]:
    """The URL of a server with its runs in a database and its artifacts in a directory."""
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", database, "--artifacts-destination", (directory / "artifacts").as_uri()]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (directory / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *places], stdout=log, stderr=log, env=environment, cwd=directory, start_new_session=True
        )
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def answers(url: str) -> bool:
    """Whether a server answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
        return bool(answer.status == 200)
    return False


def wait_until(ready: object, process: subprocess.Popen) -> None:
    """Wait until a process is ready; AssertionError if it exits before, or takes too long."""
    deadline = time.monotonic() + 180
    while not ready():  # type: ignore[operator]
        assert process.poll() is None, f"{process.args} exited"
        assert time.monotonic() < deadline, f"{process.args} does not answer"
        time.sleep(0.2)
