"""Small files that are whole or not there, and what makes writes last through a power cut."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that readers see the old or the new one whole; makes its directory if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    sync(staged)
    staged.replace(path)


def sync(path: Path) -> None:
    """Flush a file's or directory's contents to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
