"""Cache keys: a digest of the code and libraries that decide a stage's result. The stage reruns when it changes."""

import ast
import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from forge.core.digest import digest_file, digest_json
from forge.core.settings import shipped

PACKAGES = ("forge", "tasks")
# Left out of every key: they say where a task runs and what it logs, which can't change its result. A new memory limit
# or log message must not retrain a model.
EXCLUDED = ("tasks.task_pods", "tasks.flyte_sessions", "forge.core.logs")
# Libraries that decide results, by the name they are imported as: the distributions whose versions are in the key.
LIBRARIES = {
    "babel": ("babel",),
    "bitsandbytes": ("bitsandbytes",),
    "detect_secrets": ("detect-secrets",),
    "jinja2": ("jinja2",),
    "numpy": ("numpy",),
    "orjson": ("orjson",),
    "peft": ("peft",),
    "pyarrow": ("pyarrow",),
    "rapidfuzz": ("rapidfuzz",),
    "rensa": ("rensa",),
    "tokenizers": ("tokenizers",),
    "torch": ("torch",),
    "transformers": ("transformers", "tokenizers", "jinja2"),  # chat templates need jinja2
}


@functools.cache
def code_version(root: str) -> str:
    """The cache key (16 hexadecimal digits) of a package or module, such as tasks.preprocess.

    It covers the files of `root`, of the project's modules that they import, directly or not, and the versions of the
    LIBRARIES among the imports. Imports within functions count.
    """
    files, imported = import_closure(root)
    libraries = {library for name in imported for library in LIBRARIES.get(name, ())}
    return digest_json([{name: digest_file(path) for name, path in files.items()}, library_versions(libraries)])[:16]


def import_closure(root: str) -> tuple[dict[str, Path], set[str]]:
    """The files of a package or module and of all project modules that it imports, by name relative to the project; and
    the top-level names of the other modules they import.

    A package contributes all its modules if it is the root, else its __init__.py and the modules that are imported.
    Data files of a package, such as templates, count with its __init__.py.
    """
    files: dict[str, Path] = {}
    others: set[str] = set()
    waiting = [*_parents(root), *_modules(root)]
    while waiting:
        module = waiting.pop()
        path = _file_of(module)
        if path is None or module in EXCLUDED:
            continue
        is_package = path.name == "__init__.py"
        folder = module.replace(".", "/")
        name = f"{folder}/__init__.py" if is_package else f"{folder}.py"
        if name in files:
            continue
        files[name] = path
        if is_package:
            files |= {f"{folder}/{data.relative_to(path.parent).as_posix()}": data for data in _data_files(path.parent)}
        for imported in _imports(path, module if is_package else module.rpartition(".")[0]):
            top = imported.partition(".")[0]
            if top in PACKAGES:
                waiting += [*_parents(imported), imported]
            else:
                others.add(top)
    return dict(sorted(files.items())), others


def library_versions(names: set[str]) -> dict[str, str]:
    """The installed versions, without build tags (+cpu, +cu130); "" for a library that is not installed."""
    return {name: _release(name) for name in sorted(names)}


def _release(name: str) -> str:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _parents(module: str) -> list[str]:
    """The packages that Python imports before a module."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _modules(root: str) -> Iterator[str]:
    """A module and, if it is a package, all modules in it."""
    yield root
    if (path := _file_of(root)) is not None and path.name == "__init__.py":
        for file in path.parent.rglob("*.py"):
            parts = file.relative_to(path.parent).with_suffix("").parts
            yield ".".join((root, *(part for part in parts if part != "__init__")))


def _data_files(package: Path) -> Iterator[Path]:
    """The files of a package that are not code, also in subfolders that are not packages."""
    for path in package.iterdir():
        if path.name.startswith((".", "__pycache__")):
            continue
        if path.is_dir():
            if not (path / "__init__.py").exists():
                yield from _data_files(path)
        elif path.suffix not in (".py", ".pyc"):
            yield path


@functools.cache
def _imports(path: Path, package: str) -> frozenset[str]:
    """The absolute names that a file of a package imports, anywhere in it; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _file_of(module: str) -> Path | None:
    """The file of a project module. None for other names, such as a class after `from module import`."""
    inner = module.replace(".", "/")
    # Python prefers a package to a module of the same name.
    for name in (f"{inner}/__init__.py", f"{inner}.py"):
        path = shipped(name)
        if path.is_file():
            return path
    return None
