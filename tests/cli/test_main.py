"""The command as a whole, and `forge run`."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cli.main import main
from tests.cli.command import PROGRAM, error_of, forge
from tests.integration.harness import PROJECT, RECIPE, Home, gone, stopped_afterwards, wait_for

COMMANDS = {
    "run", "ask", "status", "start", "stop", "remove", "history", "lineage", "fetch", "rollback", "prune", "ui",
    "check-recipe", "doctor",
}  # fmt: skip


def test_every_command_has_help() -> None:
    assert set(main.commands) == COMMANDS
    for name in COMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert len(result.output.splitlines()) > 3


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("flytekit", "mlflow", "numpy", "openai", "pydantic", "torch", "transformers", "yaml")
    code = f"import sys, cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    help_text = forge("--help", home=tmp_path / "home").stdout
    assert "check-recipe" in help_text


def test_make_targets_run_the_command() -> None:
    for target in ("run", "ask", "ui", "status", "start", "stop", "doctor"):
        done = subprocess.run(["make", "-n", target, "ARGS=--help"], cwd=PROJECT, capture_output=True, text=True)
        assert f".venv/bin/forge {target} --help" in done.stdout


def test_run_reports_wrong_inputs_in_one_message(tmp_path: Path) -> None:
    done = forge("run", "--data-path", "missing.jsonl", "--recipe", "tiny-gpu", home=tmp_path / "home")
    message = error_of(done)
    assert message.count("Error:") == 1
    assert "missing.jsonl" in message
    assert "tiny-cpu" in message


@pytest.mark.long
def test_run_serves_a_model_and_reuses_finished_stages(tmp_path: Path) -> None:
    with stopped_afterwards(Home(tmp_path / "home")) as home:
        command = [PROGRAM, "run", "--recipe", "recipe.yaml"]
        runs = [
            subprocess.run(command, cwd=home.directory, env=home.environment, capture_output=True, text=True)
            for _ in range(2)
        ]
        for done in runs:
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout.splitlines()[-1] == home.settings.endpoint
        assert home.desired().serving.names.keys() == {"dates"}
        shown = subprocess.run([PROGRAM, "status"], env=home.environment, capture_output=True, text=True).stdout
        assert "no, all is as desired" in shown
        asked = subprocess.run([PROGRAM, "ask", "NL: 20 juni 1969"], env=home.environment, capture_output=True)
        assert asked.returncode == 0
        stopped = subprocess.run([PROGRAM, "stop"], env=home.environment, capture_output=True, text=True)
        assert stopped.stdout == "Stopped dates.\n"


@pytest.mark.long
def test_run_ends_cleanly_on_an_interrupt(tmp_path: Path) -> None:
    with stopped_afterwards(Home(tmp_path / "home")) as home:
        recipe = home.directory / "long.yaml"
        recipe.write_text(yaml.safe_dump({**RECIPE, "training": {**RECIPE["training"], "epochs": 50}}))
        process = subprocess.Popen(
            [PROGRAM, "run", "--recipe", str(recipe)],
            cwd=PROJECT, env=home.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        wait_for(process, "train: step")
        output = home.interrupt(process, signal.SIGINT)
        assert process.returncode == 1
        assert "Traceback" not in output
        assert gone(home.processes())
