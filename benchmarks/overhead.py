"""`python -m benchmarks.overhead`: the pipeline's overhead, on top of its stages' own work.

Runs the pipeline twice in a home of its own: cold, and again when nothing is left to do. The overhead is the wall time
minus the seconds that the stages report: Flyte, imports, preflight and the summary. A stage's own work includes
starting its processes (for example vLLM). The last line on stdout is one JSON object. See docs/benchmarks.md.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import say
from forge.core.settings import PROJECT, Settings
from forge.serving.local_target import LocalTarget
from forge.serving.vllm_process import LocalServer

PYFLYTE = str(Path(sys.executable).with_name("pyflyte"))
RUN = [PYFLYTE, "run", "workflows/training_pipeline.py", "training_pipeline"]
LIGHT = ", ".join(f"tasks.{stage}.task" for stage in ("preflight", "preprocess", "register", "rollout", "summary"))
STARTS = {
    "import_workflow_seconds": [sys.executable, "-c", "import workflows.training_pipeline"],
    "import_light_tasks_seconds": [sys.executable, "-c", f"import {LIGHT}"],
    "help_seconds": [*RUN, "--help"],
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead")
    parser.add_argument("--recipe", default="tiny-cpu")
    options = parser.parse_args()
    result: dict[str, Any] = {name: median(command) for name, command in STARTS.items()}
    with tempfile.TemporaryDirectory(prefix="forge-benchmark-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings = Settings(home=Path(folder) / "forge", serving_port=probe.getsockname()[1])
        probe.close()
        environment = {
            "HOME": folder, "FORGE_HOME": str(settings.home), "FORGE_SERVING_PORT": str(settings.serving_port),
        }  # fmt: skip
        try:
            for name in ("cold", "warm"):
                say(f"the pipeline, {name}")
                wall = seconds_of([*RUN, "--recipe", options.recipe], **environment)
                facts = json.loads((settings.home / "last-run.json").read_text())
                own = sum(value for key, value in facts.items() if key.startswith("seconds_"))
                result |= {f"{name}_seconds": round(wall, 1), f"{name}_own_seconds": round(own, 1)}
        finally:
            LocalTarget(settings).stop()
            LocalServer(settings).stop()
    overhead = {name: result[f"{name}_seconds"] - result[f"{name}_own_seconds"] for name in ("cold", "warm")}
    result |= {
        "overhead_seconds": round(overhead["cold"], 1),
        "overhead_warm_seconds": round(overhead["warm"], 1),
        "share": round(overhead["cold"] / result["cold_seconds"], 3),
    }
    print(json.dumps(result))


def median(command: list[str], times: int = 5) -> float:
    """Median seconds of several runs, after one that fills the page cache."""
    seconds_of(command)
    return round(statistics.median(seconds_of(command) for _ in range(times)), 2)


def seconds_of(command: list[str], **variables: str) -> float:
    """Run a command of this project; returns the seconds that it took."""
    started = time.perf_counter()
    finished = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{finished.stdout}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
