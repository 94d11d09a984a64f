"""How the local server is started, recorded and stopped; a sleeping process takes the place of vLLM."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import psutil
import pytest
from safetensors.numpy import save_file

from forge.core.contracts import Engine
from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.core.signals import signals_deferred
from forge.serving.desired import Failed
from forge.serving.engine import on_cpu
from forge.serving.vllm_process import LocalServer, RunningServer, port_is_free
from tests.serving.states import version

ENGINE = Engine()


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The directory of a model, with its configuration only."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"dtype": "float32"}')
    return str(tmp_path / "base")


@pytest.fixture
def server(tmp_path: Path) -> LocalServer:
    """A server whose program starts a child process and ignores SIGTERM."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('up', flush=True)\ntime.sleep(600)\n"
    )
    program.chmod(0o755)
    return LocalServer(Settings(home=tmp_path / "home", serving_python=program, serving_port=59_999), grace=0.1)


@pytest.fixture
def running(server: LocalServer, base: str) -> Iterator[RunningServer]:
    """The server, started. All its processes are stopped afterwards."""
    assert server.ensure(version(1), base, ENGINE).startswith("vLLM is starting")
    running = server.running()
    assert running is not None
    while "up" not in Path(running.log).read_text():
        time.sleep(0.02)
    yield running
    server.stop(grace=0)
    assert running.processes() == []


def test_a_started_server_is_recorded_and_stopped_with_its_children(
    server: LocalServer, running: RunningServer
) -> None:
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children()]
    assert len(family) == 2
    assert server.stop(grace=0.2) == running
    assert server.running() is None
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    assert server.stop() is None


def test_a_server_with_the_same_spec_is_left_alone_and_any_other_replaced(
    server: LocalServer, running: RunningServer, base: str
) -> None:
    assert server.ensure(version(1), base, ENGINE).startswith("vLLM is starting")
    assert LocalServer(server.settings).ensure(version(1), base, ENGINE) == "", "adopted by another process"
    assert server.running() == running
    for other in (version(2), version(1)):
        server.ensure(other, base, Engine(max_loras=0) if other == version(1) else ENGINE)
        now = server.running()
        assert now is not None
        assert now != running
        assert now.spec.base == other.versioned
    assert not running.alive()


def test_the_command_line(server: LocalServer, running: RunningServer, base: str) -> None:
    command = psutil.Process(running.pid).cmdline()

    def after(option: str) -> str:
        return command[command.index(option) + 1]

    assert (after("--dtype"), after("--model")) == ("float32", base), "the model's own precision"
    assert after("--served-model-name") == version(1).versioned
    assert after("--max-loras") == "2"
    assert after("--middleware") == "forge.serving.aliases.PublicNames"
    assert psutil.Process(running.pid).environ()["SERVED_NAMES"] == str(server.names_file)


def test_a_server_that_died_is_started_again_and_its_log_is_kept(
    server: LocalServer, running: RunningServer, base: str
) -> None:
    (child,) = psutil.Process(running.pid).children()
    os.kill(running.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(running.pid)], timeout=10)
    again = LocalServer(server.settings)  # it doesn't know whether the server was ever ready
    assert "is started again" in again.ensure(version(1), base, ENGINE)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    now = again.running()
    assert now is not None
    assert now.pid != running.pid
    assert Path(f"{running.log}.before").read_text() == "up\n"


def test_unreadable_weights_fail_before_anything_is_started(server: LocalServer, base: str) -> None:
    Path(base, "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(Failed, match="cannot be read"):
        server.ensure(version(1), base, ENGINE)
    assert server.running() is None


def test_on_a_cpu_only_the_linear_layers_of_blocks_get_adapters(tmp_path: Path) -> None:
    weights = {
        "model.embed_tokens.weight": (4, 2), "model.layers.0.self_attn.q_proj.weight": (2, 2),
        "model.layers.0.self_attn.q_proj.bias": (2,), "model.layers.0.input_layernorm.weight": (2,),
        "model.layers.1.mlp.up_proj.weight": (2, 2), "model.norm.weight": (2,), "lm_head.weight": (4, 2),
    }  # fmt: skip
    save_file({name: numpy.zeros(shape, "float32") for name, shape in weights.items()}, tmp_path / "m.safetensors")
    assert on_cpu(str(tmp_path), ENGINE) == ["--enforce-eager", "--lora-target-modules", "q_proj", "up_proj"]
    assert on_cpu(str(tmp_path), Engine(max_loras=0)) == ["--enforce-eager"]


def test_a_server_whose_engine_has_died_does_not_serve(server: LocalServer, running: RunningServer, base: str) -> None:
    adopted = LocalServer(server.settings)
    assert adopted.ensure(version(1), base, ENGINE) == "", "it may be busy"
    with answering(server.settings.serving_port, status=503):
        assert adopted.ensure(version(1), base, ENGINE) == f"vLLM's engine has died; its log is {running.log}"


@contextlib.contextmanager
def answering(port: int, status: int) -> Iterator[None]:
    """A server that answers every request with this status."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


def test_a_server_that_was_not_recorded_before_a_kill_is_found(
    server: LocalServer, running: RunningServer, base: str
) -> None:
    server.record.unlink()
    server.ensure(version(1), base, ENGINE)
    assert not running.alive()


def test_the_error_for_a_broken_record_names_the_file(server: LocalServer) -> None:
    server.record.parent.mkdir(parents=True)
    server.record.write_text('{"spec": {}}')
    with pytest.raises(ForgeError, match=r"server\.json: not a valid record of a vLLM server"):
        server.running()


def test_another_process_with_the_same_pid_is_not_the_server(server: LocalServer, running: RunningServer) -> None:
    server.record.write_text(server.record.read_text().replace(str(running.ticks), str(running.ticks - 60)))
    assert server.running() is None


def test_a_server_that_exits_during_startup_fails_with_its_log(server: LocalServer, base: str) -> None:
    server.settings.serving_python.write_text(f"#!{sys.executable}\nprint('no such model')\n")
    server.ensure(version(1), base, ENGINE)
    started = server.recorded()
    assert started is not None
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(started.pid).wait(60)
    with pytest.raises(Failed, match="no such model"):
        server.ensure(version(1), base, ENGINE)
    assert server.recorded() is None, "it is started again the next time"


def test_a_port_in_use_is_reported(server: LocalServer, base: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = server.settings.model_copy(update={"serving_port": taken.getsockname()[1]})
        with pytest.raises(Failed, match=r"port \d+ is in use by another program; stop it, or set FORGE_SERVING_PORT"):
            LocalServer(settings).ensure(version(1), base, ENGINE)
        assert not port_is_free(settings.serving_port)
    assert port_is_free(settings.serving_port)


def test_signals_can_be_deferred() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), signals_deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        done = True
    assert done
