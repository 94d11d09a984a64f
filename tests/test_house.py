"""The rules that keep the house easy to live in: which folder may import which, and that names say one thing."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
STAGES = ("preflight", "preprocess", "finetune", "evaluate", "register", "rollout", "summary")
# The rooms of forge/, from the ground up: a room imports itself and those before it.
ROOMS = ("core", "cluster", "storage", "registry", "capacity", "models", "serving")
# What each package has one of.
EVERYWHERE = {"__init__", "__main__", "task"}


def modules() -> dict[str, Path]:
    """The modules of the project, by their dotted names."""
    found = {}
    for package in ("forge", "tasks", "workflows", "cli"):
        for path in (PROJECT / package).rglob("*.py"):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path, within_functions: bool = True) -> set[str]:
    """Dotted names that a file imports, anywhere in it or when it is itself imported."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if within_functions else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room(name: str) -> str:
    """The folder of a module, such as forge.core or tasks.evaluate."""
    return ".".join(name.split(".")[:2])


MODULES = modules()


def test_what_stages_share_knows_neither_flytekit_nor_a_stage() -> None:
    for name, path in MODULES.items():
        if name.startswith("forge"):
            roots = {imported.split(".")[0] for imported in imports(path)}
            assert not roots & {"flytekit", "flytekitplugins", "tasks", "workflows", "cli"}, name


@pytest.mark.parametrize("at", range(len(ROOMS)), ids=ROOMS)
def test_rooms_rest_on_those_below(at: int) -> None:
    above = {f"forge.{one}" for one in ROOMS[at + 1 :]}
    for name, path in MODULES.items():
        if room(name) == f"forge.{ROOMS[at]}":
            assert not {room(imported) for imported in imports(path)} & above, name


def test_every_room_has_its_place() -> None:
    assert {path.name for path in (PROJECT / "forge").iterdir() if (path / "__init__.py").exists()} == set(ROOMS)
    assert {path.name for path in (PROJECT / "tasks").iterdir() if (path / "__init__.py").exists()} == set(STAGES)


def test_only_doors_import_flytekit() -> None:
    # Nor does anything else import what says which pods tasks run in.
    doors = {f"tasks.{stage}.task" for stage in STAGES} | {"tasks.task_pods"}
    for name, path in MODULES.items():
        if name.startswith("tasks.") and name not in doors:
            bad = {one for one in imports(path) if one.startswith("flytekit") or one == "tasks.task_pods"}
            assert bad == set(), name


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_one_another(stage: str) -> None:
    # Preflight alone knows the others, since it checks what they need.
    others = {f"tasks.{other}" for other in STAGES if other != stage}
    for name, path in MODULES.items():
        if room(name) == f"tasks.{stage}" and stage != "preflight":
            assert {room(one) for one in imports(path)} & others == set(), name


def test_only_the_command_line_imports_the_command_line() -> None:
    for name, path in MODULES.items():
        if not name.startswith("cli"):
            assert not {one for one in imports(path) if one.split(".")[0] == "cli"}, name
        elif name != "cli.pipeline":
            assert not {one for one in imports(path) if one.split(".")[0] in ("flytekit", "workflows")}, name


def test_workflows_import_doors_and_what_they_take() -> None:
    for name, path in MODULES.items():
        if name.startswith("workflows"):
            for imported in imports(path) & set(MODULES):
                assert imported.endswith(".task") or imported.startswith(("workflows", "forge")), (name, imported)


def test_no_import_cycle() -> None:
    graph = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    # A package's __init__ that gathers its modules is no cycle with them: they name their siblings.
    for name in graph:
        graph[name] -= {".".join(name.split(".")[:count]) for count in range(1, name.count(".") + 1)}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_module_names_do_not_collide() -> None:
    # A workflow is named as what it does, which a stage may have a module for.
    stems = Counter(
        path.stem for name, path in MODULES.items() if path.stem not in EVERYWHERE and not name.startswith("workflows")
    )
    assert {stem: count for stem, count in stems.items() if count > 1} == {}


def test_public_names_do_not_collide() -> None:
    """A public class or function means one thing in the whole project."""
    places: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if path.stem in EVERYWHERE or not name.startswith(("forge", "tasks")):
            continue  # tasks, workflows and commands are named as what they run
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places.setdefault(node.name, set()).add(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_files_are_short() -> None:
    long = {name: count for name, path in MODULES.items() if (count := len(path.read_text().splitlines())) > 400}
    assert long == {}


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
