"""The local server's bookkeeping, without vLLM: a process that only sleeps stands where it would."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from tasks.contracts import Version
from tasks.errors import ForgeError
from tasks.promotion import promote
from tasks.recipe import ServingRecipe
from tasks.registry import open_registry
from tasks.rollout.rollout import roll_out, rollout_lock
from tasks.rollout.server import LocalServer, Running, Spec, port_is_free, signals_deferred
from tasks.settings import Settings
from tasks.storage import DirectoryStore
from tests.conftest import Trained


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """What the server is to serve: a model of which there is only the configuration."""
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    return Spec(name="dates", version="1", digest="d" * 64, path=str(tmp_path), port=59_999)


@pytest.fixture
def server(tmp_path: Path) -> LocalServer:
    """A server whose program starts a child and ignores SIGTERM."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('up', flush=True)\ntime.sleep(600)\n"
    )
    program.chmod(0o755)
    return LocalServer(Settings(home=tmp_path / "home", serving_python=program))


def test_a_started_server_is_recorded_and_stopped_with_its_children(server: LocalServer, spec: Spec) -> None:
    running = server.start(spec)
    while "up" not in Path(running.log).read_text():
        time.sleep(0.02)
    assert server.running() == running
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children()]
    assert len(family) == 2
    assert not running.healthy()
    assert server.stop(grace=0.2) == running
    assert server.running() is None
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    assert server.stop() is None


def test_the_model_s_own_precision_is_served(server: LocalServer, spec: Spec) -> None:
    running = server.start(spec)
    command = psutil.Process(running.pid).cmdline()
    assert command[command.index("--dtype") + 1] == "float32"
    server.stop(grace=0)


def test_what_a_dead_server_left_is_stopped_too(server: LocalServer, spec: Spec) -> None:
    running = server.start(spec)
    while "up" not in Path(running.log).read_text():
        time.sleep(0.02)
    (child,) = psutil.Process(running.pid).children()
    os.kill(running.pid, signal.SIGKILL)
    os.waitpid(running.pid, 0)
    assert server.running() is None
    assert child.is_running()
    assert server.stop() is None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_broken_record_is_named(server: LocalServer) -> None:
    server.record.parent.mkdir(parents=True)
    server.record.write_text('{"spec": {}}')
    with pytest.raises(ForgeError, match=r"server\.json is broken"):
        server.running()


def test_health_is_asked_without_a_proxy(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Healthy) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        assert Running(replace(spec, port=http.server_port), 0, 0, "").healthy()
        http.shutdown()


def test_another_process_of_the_same_number_is_not_ours(server: LocalServer, spec: Spec) -> None:
    running = server.start(spec)
    server.record.write_text(server.record.read_text().replace(str(running.ticks), str(running.ticks - 60)))
    assert server.running() is None
    os.killpg(running.pid, signal.SIGKILL)


def test_a_server_that_ends_while_it_starts_is_told_with_its_log(server: LocalServer, spec: Spec) -> None:
    server.settings.serving_python.write_text(f"#!{sys.executable}\nprint('no such model')\n")
    with pytest.raises(ForgeError, match="no such model"):
        server.wait_ready(server.start(spec), timeout=30)


def test_a_server_that_is_never_ready_is_told(server: LocalServer, spec: Spec) -> None:
    running = server.start(spec)
    with pytest.raises(ForgeError, match="not ready after 0 s"):
        server.wait_ready(running, timeout=0)
    server.stop(grace=0)


def test_a_taken_port_is_not_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)


def test_one_rollout_at_a_time(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with rollout_lock(settings, 1), pytest.raises(ForgeError, match="another rollout"), rollout_lock(settings, 0.1):
        pass


def test_a_lock_does_not_outlive_its_holder(tmp_path: Path) -> None:
    code = (
        "import os\nfrom pathlib import Path\n"
        "from tasks.rollout.rollout import rollout_lock\nfrom tasks.settings import Settings\n"
        f"with rollout_lock(Settings(home=Path({str(tmp_path)!r})), 1):\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with rollout_lock(Settings(home=tmp_path), 1):
        pass


def test_a_signal_waits_for_the_moment_to_pass() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), signals_deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        done = True
    assert done


@pytest.mark.parametrize(
    ("compared", "champion", "says"),
    [
        ("", "2", "compared with no champion, but the champion is version 2 now; run again"),
        ("1", "2", "compared with version 1, but the champion is version 2 now"),
        ("1", None, "compared with version 1, but the champion is gone now"),
    ],
)
def test_a_verdict_on_a_champion_of_yesterday_rolls_nothing_out(
    trained: Trained, tmp_path: Path, compared: str, champion: str | None, says: str
) -> None:
    settings = Settings(home=tmp_path)
    client = open_registry(settings)
    client.create_registered_model("dates")
    for _ in range(3):
        client.create_model_version("dates", source=trained.model.uri)
    if champion:
        promote(client, DirectoryStore(tmp_path / "store"), "dates", champion, "", "a test")
    version = Version(
        uri=trained.model.uri, digest="d", store=trained.store.identity, name="dates", version="3", run_id=""
    )
    evaluation = trained.evaluation.model_copy(update={"champion": compared})
    with pytest.raises(ForgeError, match=says):
        roll_out(version, evaluation, ServingRecipe(), settings, trained.store)
    assert LocalServer(settings).running() is None
