"""`forge doctor` on machines in order, and on others."""

import socket
import subprocess
import sys
from pathlib import Path

from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from tests.cli.command import forge

# Stands in for an environment's Python: what it prints is read as a version.
PYTHON = "#!/bin/sh\necho vllm 1.2.3\n"


def python_with_vllm(folder: Path) -> str:
    """The path of a Python that says that it has vLLM."""
    program = folder / "python"
    program.write_text(PYTHON)
    program.chmod(0o755)
    return str(program)


def free_port() -> str:
    """A port that no program listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def states(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What was found, by check: ok, optional or problem."""
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    return {line[10:22].strip(): line[:8].strip() for line in lines}


def test_a_machine_in_order_before_its_first_run(tmp_path: Path) -> None:
    home, python = tmp_path / "home", python_with_vllm(tmp_path)
    found = {"serving_python": python, "harness_python": python, "serving_port": free_port()}
    done = forge("doctor", home=home, **found)
    assert done.returncode == 0, done.stdout
    assert states(done).keys() == {
        "settings", "vLLM", "port", "harness", "store", "MLflow", "signing keys", "GPUs", "disk"
    }  # fmt: skip
    assert set(states(done).values()) == {"ok"}
    assert "vllm 1.2.3" in done.stdout
    assert not home.exists(), "nothing is created"


def test_what_is_missing_is_found_together_with_its_fix(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        wrong = {
            "serving_python": sys.executable, "harness_python": "/nowhere/python", "serving_port": port,
            "mlflow_uri": "http://127.0.0.1:1", "store": "s3://team/forge", "signing_key": str(tmp_path / "key"),
        }  # fmt: skip
        done = forge("doctor", home=tmp_path / "home", **wrong)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert {name for name, state in states(done).items() if state == "problem"} == {
        "vLLM", "port", "store", "MLflow", "signing keys"
    }  # fmt: skip
    assert states(done)["harness"] == "optional"
    for fix in ("make setup", "FORGE_SERVING_PORT", "FORGE_S3_ENDPOINT", "FORGE_MLFLOW_URI", "make .venv-harness"):
        assert fix in done.stdout
    assert "5 problems found" in done.stderr


def test_wrong_settings_are_the_only_finding(tmp_path: Path) -> None:
    done = forge("doctor", home=tmp_path / "home", serving_prot="8001")
    assert (done.returncode, states(done)["settings"]) == (1, "problem")
    assert "did you mean FORGE_SERVING_PORT?" in done.stdout


def test_an_existing_registry_is_read(tmp_path: Path) -> None:
    home = tmp_path / "home"
    open_registry(Settings(home=home)).create_registered_model("dates")
    done = forge("doctor", home=home, serving_port=free_port())
    assert states(done)["MLflow"] == "ok"
    assert "models: dates" in done.stdout


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    cluster = {"serving_target": "kubernetes", "serving_url": "http://vllm:8000"}
    done = forge("doctor", home=tmp_path / "home", reconciler_url="http://127.0.0.1:1", **cluster)
    assert done.returncode == 1
    assert states(done)["reconciler"] == "problem"
    assert "vLLM" not in states(done)
