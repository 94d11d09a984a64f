"""The registry's workflows, run by pyflyte."""

import subprocess
import sys
from pathlib import Path

import pytest

from forge.core.recipe import Recipe
from forge.core.settings import load_settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.promotion import promote
from forge.storage import open_store
from tests.register.packages import inputs
from workflows.launch_plans import registry_retention
from workflows.registry import history, lineage, retention


def test_history_lineage_and_retention_workflows(tmp_path: Path, recipe: Recipe, capfd: pytest.CaptureFixture) -> None:
    settings = load_settings()
    version = inputs(tmp_path, settings, recipe).register(settings)
    promote(open_registry(settings), open_store(settings), "dates", "1", "", "better")
    assert history(name="dates") == ["1"]
    assert "champion" in capfd.readouterr().out
    assert lineage(name="dates") == lineage(name="dates", version="1") == version.uri
    assert "rows from: s3://team/raw" in capfd.readouterr().out
    assert retention() == []
    assert "0 packages, 0.0 MB would be freed" in capfd.readouterr().out


def test_a_user_error_is_one_message(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("pyflyte"), "run", "workflows/registry.py", "history", "--name", "words"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "words: no such registered model; there are: none yet" in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stdout + done.stderr


def test_the_scheduled_retention_removes_packages() -> None:
    assert registry_retention.name == "registry_retention"
    assert registry_retention.fixed_inputs.literals["apply"].scalar.primitive.boolean is True
    assert registry_retention.schedule.cron_schedule.schedule == "0 9 * * 0"
