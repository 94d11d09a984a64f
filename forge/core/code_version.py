"""What decides a result: the code that makes it and the libraries it uses. Only a change to those runs it again."""

import ast
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from forge.core.digest import digest_file, digest_json
from forge.core.settings import shipped

PACKAGES = ("forge", "tasks")
# They say where a task runs and what it logs, not what it makes: a longer grace period trains no model again.
NOT_DECIDING = ("tasks.task_pods", "tasks.flyte_sessions", "forge.core.logs")
# Libraries that decide results, by the name they are imported as: themselves, and what they bring of the kind.
LIBRARIES = {
    "bitsandbytes": ("bitsandbytes",),
    "jinja2": ("jinja2",),
    "numpy": ("numpy",),
    "peft": ("peft",),
    "tokenizers": ("tokenizers",),
    "torch": ("torch",),
    "transformers": ("transformers", "tokenizers", "jinja2"),
}


@functools.cache
def code_version(root: str) -> str:
    """Digest (16 hexadecimal digits) of a package or module, of all in the project that it imports, directly or not,
    and of the versions of the libraries among LIBRARIES that they import.

    `root` is dotted, such as tasks.preprocess. Imports within functions count as well.
    """
    files, imported = import_closure(root)
    needed = {library for name in imported for library in LIBRARIES.get(name, ())}
    return digest_json([{name: digest_file(path) for name, path in files.items()}, library_versions(needed)])[:16]


def import_closure(root: str) -> tuple[dict[str, Path], set[str]]:
    """The files of a package or module and of what it imports of the project, by their names in it, and the top-level
    names of the other modules that these import.
    """
    files: dict[str, Path] = {}
    others: set[str] = set()
    found = list(_modules(root))
    while found:
        module = found.pop()
        path = _file_of(module)
        if path is None or module in NOT_DECIDING:
            continue
        name = f"{module.replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        if name in files:
            continue
        files[name] = path
        if path.name == "__init__.py":  # templates and other data of the package
            files |= {f"{module.replace('.', '/')}/{one.name}": one for one in path.parent.iterdir() if _is_data(one)}
        for imported in _imports(path):
            parts = imported.split(".")
            if parts[0] in PACKAGES:
                found += [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            else:
                others.add(parts[0])
    return dict(sorted(files.items())), others


def library_versions(names: set[str]) -> dict[str, str]:
    """The installed releases without their build (+cpu, +cu130); "" for a library that is not installed."""
    return {name: _release(name) for name in sorted(names)}


def _release(name: str) -> str:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _modules(root: str) -> Iterator[str]:
    """A module, and where it is a package, all in it."""
    yield root
    if (path := _file_of(root)) is not None and path.name == "__init__.py":
        for file in path.parent.rglob("*.py"):
            parts = file.relative_to(path.parent).with_suffix("").parts
            yield ".".join((root, *(part for part in parts if part != "__init__")))


@functools.cache
def _imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports anywhere in it; of `from a import b`, both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _file_of(module: str) -> Path | None:
    """The file of a module of the project; None of what is no module."""
    inner = module.replace(".", "/")
    for name in (f"{inner}.py", f"{inner}/__init__.py"):
        path = shipped(name)
        if path.is_file():
            return path
    return None


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".py", ".pyc")
