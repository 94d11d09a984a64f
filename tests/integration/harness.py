"""Run the pipeline as a user does, in a home of its own, and inspect the result."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from forge.core.settings import Settings
from forge.serving.desired import Desired
from forge.serving.local_target import LocalTarget
from forge.serving.vllm_process import LocalServer, RunningServer

PROJECT = Path(__file__).parents[2]
RECIPE = {
    "name": "dates",
    "data": {"source": "demonstration", "demonstration": {"rows": 6000}, "max_seq_len": 128},
    "model": {"architecture": {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128}},
    "training": {"nproc_per_node": 2, "global_batch_size": 8, "epochs": 1, "learning_rate": 0.004, "precision": "fp32"},
    "evaluation": {"items": 64, "max_new_tokens": 32},
    "gate": {"metric": "nll", "min_json_validity": 0.0, "min_finished": 0.0},  # it answers badly
    "serving": {"replay": 8, "watch_seconds": 1, "max_latency_ratio": 100},  # machines are busy
}


@dataclass
class Home:
    """A directory with its own Forge home, Flyte cache and serving port."""

    directory: Path
    variables: dict[str, str] = field(default_factory=dict)  # more settings

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.settings = Settings(home=self.directory / "forge", serving_port=self.port)
        self.write_recipe()

    def write_recipe(self, **sections: dict) -> None:
        """Write the recipe with changes to some sections."""
        recipe = {
            name: {**value, **sections.get(name, {})} if isinstance(value, dict) else value
            for name, value in RECIPE.items()
        }
        (self.directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a process that uses this home."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("FORGE_")},
            "HOME": str(self.directory),
            "FORGE_HOME": str(self.settings.home),
            "FORGE_SERVING_PORT": str(self.port),
            **self.variables,
        }

    def start(self, *arguments: str, workflow: str = "training_pipeline") -> subprocess.Popen:
        """Start `pyflyte run` on a workflow, in a session of its own, as in a terminal."""
        command = [str(Path(sys.executable).parent / "pyflyte"), "run", f"workflows/{workflow}.py", workflow]
        if workflow != "rollback":
            command += ["--recipe", str(self.directory / "recipe.yaml")]
        return subprocess.Popen(
            [*command, *arguments],
            cwd=PROJECT, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str, workflow: str = "training_pipeline") -> tuple[int, str]:
        """Run a workflow to its end; returns its exit status and output."""
        process = self.start(*arguments, workflow=workflow)
        try:
            output, _ = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def facts(self) -> dict:
        """The results of the last run."""
        return json.loads((self.settings.home / "last-run.json").read_text())

    def served(self) -> RunningServer | None:
        """The running server, if any."""
        return LocalServer(self.settings).running()

    def desired(self) -> Desired:
        """The desired state of serving."""
        return LocalTarget(self.settings).document.read()[0]

    def serving(self) -> set[int]:
        """IDs of the processes that outlive a run: vLLM and the reconciler."""
        served = self.served()
        record = self.settings.serving / "reconciler.json"
        reconciler = {json.loads(record.read_text())["pid"]} if record.exists() else set()
        return reconciler | ({process.pid for process in served.processes()} if served else set())

    def stop(self) -> None:
        """Stop serving."""
        LocalTarget(self.settings).stop()
        LocalServer(self.settings).stop()

    def processes(self) -> list[psutil.Process]:
        """All processes of this home, including the server."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("FORGE_HOME") == str(self.settings.home)
                # vLLM's process titles overwrite its environment.
                if ours or Path(process.cwd()).is_relative_to(self.settings.home):
                    processes.append(process)
        return processes

    def interrupt(self, process: subprocess.Popen, number: int = signal.SIGINT) -> str:
        """Send Ctrl-C or another signal; returns the remaining output."""
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
        return output


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read a process's output up to the first line that contains a text; returns that output."""
    output = ""
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if text in line:
            return output
    raise AssertionError(f"exited before it printed {text!r}:\n{output}")


def gone(processes: list[psutil.Process], within: float = 10.0) -> bool:
    """Whether the processes exit in time."""
    deadline = time.monotonic() + within
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextlib.contextmanager
def stopped_afterwards(home: Home) -> Iterator[Home]:
    """A home that is stopped at the end; fails if processes are left over."""
    try:
        yield home
    finally:
        home.stop()
        left = home.processes()
        all_gone = gone(left)
        for process in left:
            process.kill()
        assert all_gone, f"left running: {left}"
