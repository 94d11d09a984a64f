"""The rules of the house that keep it easy to live in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
STAGES = ("preprocess", "finetune", "evaluate", "register", "rollout")


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_only_doors_import_flytekit() -> None:
    # Nor does anything but doors import tasks.pods, which says what their pods are.
    files = [path for path in (PROJECT / "tasks").rglob("*.py") if path.name != "task.py" and path.stem != "pods"]
    assert len(files) > 20
    offenders = [
        path
        for path in files
        if any(name.split(".")[0].startswith("flytekit") or name == "tasks.pods" for name in imports(path))
    ]
    assert offenders == []


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_one_another(stage: str) -> None:
    others = {f"tasks.{other}" for other in (*STAGES, "preflight", "summary") if other != stage}
    for path in (PROJECT / "tasks" / stage).rglob("*.py"):
        crossing = {name for name in imports(path) if ".".join(name.split(".")[:2]) in others}
        assert crossing == set(), path


def test_workflows_import_doors_only() -> None:
    for path in (PROJECT / "workflows").glob("*.py"):
        names = {name for name in imports(path) if name.startswith("tasks.") and name.count(".") == 2}
        rooms = {
            name for name in names if name.split(".")[1] not in ("contracts", "recipe", "settings")
        }  # what doors take and give
        assert all(name.endswith(".task") for name in rooms), path


def test_neither_doors_nor_workflows_import_torch() -> None:
    heavy = ("torch", "transformers", "mlflow")
    code = f"import sys, workflows.launch_plans; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_help_is_short_and_without_a_schema() -> None:
    command = [
        Path(sys.executable).parent / "pyflyte",
        "run",
        "workflows/training_pipeline.py",
        "training_pipeline",
        "--help",
    ]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "--data_path" in result.stdout
    assert "shipped recipe" in result.stdout
    assert "properties" not in result.stdout
    assert len(result.stdout.splitlines()) < 45
