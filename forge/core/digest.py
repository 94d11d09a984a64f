"""SHA-256 digests of files, directories and values, in hexadecimal."""

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

THREADS = 4  # files hashed in parallel


def digest_file(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_directory(directory: Path, exclude: Collection[str] = ()) -> tuple[str, dict[str, str]]:
    """The digest of a directory, and of each of its files by relative path (POSIX form, sorted).

    It depends only on the files' names and contents. `exclude` are relative paths to leave out.
    """
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = sorted(name for path in paths if (name := path.relative_to(directory).as_posix()) not in exclude)
    with ThreadPoolExecutor(THREADS) as pool:  # hashlib releases the GIL
        files = dict(zip(names, pool.map(lambda name: digest_file(directory / name), names), strict=True))
    return digest_json(files), files


def digest_model(directory: Path) -> str:
    """The digest of a model's directory, without what tools keep there for themselves, such as .cache and .git."""
    paths = (path.relative_to(directory) for path in directory.rglob("*"))
    hidden = {path.as_posix() for path in paths if any(part.startswith(".") for part in path.parts)}
    return digest_directory(directory, exclude=hidden)[0]
