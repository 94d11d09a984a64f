"""Digests: SHA-256 in hexadecimal, of files, of directories and of values."""

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HASHED_AT_ONCE = 4  # files


def digest_file(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_directory(directory: Path, exclude: Collection[str] = ()) -> tuple[str, dict[str, str]]:
    """Digest of a directory's contents, and each file's own by relative path (POSIX form, sorted).

    Depends on the files' names and contents only, not on times or order. `exclude` holds relative paths left out.
    """
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = sorted(name for path in paths if (name := path.relative_to(directory).as_posix()) not in exclude)
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:  # hashing holds no lock of Python's
        files = dict(zip(names, pool.map(lambda name: digest_file(directory / name), names), strict=True))
    return digest_json(files), files
