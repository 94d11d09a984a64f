"""The cache key of a stage changes with all code and libraries that decide its result, and with nothing else."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.core import code_version as module
from forge.core.code_version import LIBRARIES, code_version, import_closure, library_versions

PROJECT = Path(__file__).parents[2]
ROOTS = ("tasks.preprocess", "tasks.finetune", "tasks.evaluate", "forge.serving")
# Modules that decide a stage's result and are not in its own package.
DECIDING = {
    "tasks.preprocess": ["forge/core/recipe.py", "forge/core/contracts.py", "forge/storage/artifacts.py"],
    "tasks.finetune": [
        "forge/capacity/training_memory.py",  # resolve_parallelism
        "forge/capacity/model_size.py",
        "forge/core/recipe.py",
        "forge/registry/packages.py",
        "forge/storage/__init__.py",
        "forge/storage/directory_store.py",  # by `from forge.storage import open_store`
        "forge/storage/bucket_store.py",
    ],
    "tasks.evaluate": ["forge/core/recipe.py", "forge/registry/packages.py", "forge/serving/vllm_environment.py"],
    "forge.serving": ["forge/capacity/serving_memory.py", "forge/registry/packages.py", "forge/storage/lease.py"],
}
OUTSIDE = (
    "tasks/task_pods.py", "tasks/flyte_sessions.py", "forge/core/logs.py", "tasks/summary/task.py",
    "tasks/rollout/rollout.py", "workflows/training_pipeline.py", "recipes/tiny-cpu.yaml", "infra/nodes.yaml",
)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose files may be changed."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("forge", "tasks", "workflows", "recipes"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "infra").mkdir()
    shutil.copy(PROJECT / "infra" / "nodes.yaml", folder / "infra")
    return folder


@pytest.fixture(autouse=True)
def _in_the_copy(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "shipped", lambda name: project / name)
    module._imports.cache_clear()
    yield
    module._imports.cache_clear()


def key(root: str) -> str:
    """The key now: the cached function computes it once per process."""
    module._imports.cache_clear()
    return code_version.__wrapped__(root)


def closure(root: str) -> dict[str, Path]:
    return import_closure(root)[0]


def test_the_key_is_short_and_the_same_in_another_process(tmp_path: Path) -> None:
    code = f"from forge.core.code_version import code_version; print(*map(code_version, {ROOTS}))"
    other = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    keys = [key(root) for root in ROOTS]
    assert other.stdout.split() == keys, "neither the folder nor the order of sets matters"
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in keys)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("root", ROOTS)
def test_touching_any_file_of_the_closure_changes_the_key(root: str) -> None:
    before, seen = key(root), set()
    files = closure(root)
    assert len(files) > 20
    for name, path in files.items():
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        try:
            # Only the file's digest changes, so the parsed imports may be reused.
            after = code_version.__wrapped__(root)
        finally:
            path.write_bytes(text)
        assert after != before, name
        seen.add(after)
    assert len(seen) == len(files), "each change gives another key"
    assert key(root) == before


@pytest.mark.parametrize("root", ROOTS)
def test_every_file_of_the_stage_itself_is_in_the_closure(root: str, project: Path) -> None:
    folder = project / root.replace(".", "/")
    own = {path.relative_to(project).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert own <= set(closure(root))


@pytest.mark.parametrize("root", ROOTS)
def test_shared_modules_that_decide_results_are_in_the_closure(root: str) -> None:
    assert set(DECIDING[root]) <= set(closure(root))


@pytest.mark.parametrize("root", ROOTS)
def test_touching_a_file_outside_the_closure_changes_nothing(root: str, project: Path) -> None:
    before = key(root)
    for name in OUTSIDE:
        assert name not in closure(root)
        path = project / name
        text = path.read_bytes()
        path.write_bytes(text + b"\n# changed\n")
        try:
            assert key(root) == before, name
        finally:
            path.write_bytes(text)


def test_a_new_module_changes_the_key(project: Path) -> None:
    before = key("tasks.preprocess")
    path = project / "tasks" / "preprocess" / "another.py"
    path.write_text('"""New."""\n')
    try:
        assert key("tasks.preprocess") != before
    finally:
        path.unlink()
    assert key("tasks.preprocess") == before


def test_templates_count_and_editors_files_do_not(project: Path) -> None:
    before = key("tasks.evaluate")
    assert "tasks/evaluate/report.html.j2" in closure("tasks.evaluate")
    assert "tasks/evaluate/vllm_worker.py" in closure("tasks.evaluate"), "which no module imports"
    folder = project / "tasks" / "evaluate"
    (folder / "__pycache__").mkdir()
    for name in (".report.html.j2.swp", "__pycache__/gate.cpython-311.pyc"):
        (folder / name).write_bytes(b"x")
    assert key("tasks.evaluate") == before
    (folder / "templates").mkdir()
    (folder / "templates" / "page.html").write_text("<p>")
    assert key("tasks.evaluate") != before
    shutil.rmtree(folder / "templates")
    shutil.rmtree(folder / "__pycache__")
    (folder / ".report.html.j2.swp").unlink()


def test_all_forms_of_imports_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "forge/__init__.py": "",
        "forge/core/__init__.py": "from .names import NAME",  # relative, of a package
        "forge/core/names.py": "NAME = 1",
        "forge/core/lazy.py": "def run():\n    import numpy.linalg\n    from forge.core import deep",
        "forge/core/deep.py": "from . import deeper\nfrom ..cluster import nodes",
        "forge/core/deeper.py": "import forge.cluster.gpus as gpus",
        "forge/core/unused.py": "",
        "forge/cluster/__init__.py": "",
        "forge/cluster/nodes.py": "if False:\n    from forge.core.names import NAME",
        "forge/cluster/gpus.py": "import os, torch",
        "tasks/__init__.py": "",
        "tasks/stage.py": "import forge.core.lazy",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "shipped", lambda name: tmp_path / name)
    found, others = import_closure("tasks.stage")
    assert set(found) == set(files) - {"forge/core/unused.py"}
    assert others == {"numpy", "os", "torch"}


def test_code_that_is_not_next_to_this_module_comes_from_the_image(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pyflyte run --remote` uploads code, and Python finds the rest of a package's data in the image."""
    monkeypatch.setattr(module, "shipped", lambda name: next(
        (path for path in (tmp_path / name, project / name) if path.exists()), tmp_path / name
    ))  # fmt: skip
    before = key("tasks.finetune")
    changed = tmp_path / "forge" / "capacity" / "model_size.py"
    changed.parent.mkdir(parents=True)
    shutil.copy(project / "forge" / "capacity" / "model_size.py", changed)
    assert key("tasks.finetune") == before, "the same contents elsewhere"
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert key("tasks.finetune") != before, "uploaded code has precedence"


def versions(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that other versions of libraries are installed; "" for one that is not."""
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if changes.get(name) == "":
            raise importlib.metadata.PackageNotFoundError(name)
        return changes.get(name) or installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("root", "libraries"),
    [
        ("tasks.preprocess", ["tokenizers", "transformers", "jinja2", "numpy", "babel", "rensa", "detect-secrets"]),
        ("tasks.finetune", ["torch", "transformers", "tokenizers", "peft", "bitsandbytes", "numpy"]),
        ("tasks.evaluate", ["torch", "transformers", "tokenizers", "peft", "jinja2", "numpy", "rapidfuzz"]),
        ("forge.serving", ["torch", "transformers"]),
    ],
)
def test_another_version_of_a_deciding_library_changes_the_key(
    root: str, libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(root)
    for name in libraries:
        for version in ("0.0.1", ""):
            with monkeypatch.context() as patch:
                versions({name: version}, patch)
                assert key(root) != before, f"{name} {version}"


@pytest.mark.parametrize("root", ROOTS)
def test_builds_of_a_version_and_other_libraries_do_not(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(root)
    release = importlib.metadata.version("torch").partition("+")[0]
    for build in ("", "+cpu", "+cu130"):
        with monkeypatch.context() as patch:
            versions({"torch": release + build, "rich": "0.0.1", "mlflow": "0.0.1", "pytest": "0.0.1"}, patch)
            assert key(root) == before, build


def test_every_library_is_installed_here() -> None:
    """A typing error in LIBRARIES would leave a library out of all keys."""
    found = library_versions({name for names in LIBRARIES.values() for name in names})
    assert [name for name, version in found.items() if not version] == []
    imported = set().union(*(import_closure(root)[1] for root in ROOTS))
    assert set(LIBRARIES) <= imported
