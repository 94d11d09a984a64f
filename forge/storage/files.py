"""Files and directories that are whole or not there, and what makes writes last through a power cut."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from forge.core.processes import is_alive, this_process

ABANDONED = 3 * 24 * 3600  # seconds; no stage works for so long


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace a small file so that readers see the old or the new one whole; makes its directory if need be.

    What need not outlive a power cut is not `durable`: a busy disk may take a second to say that it has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    if durable:
        sync(staged)
    staged.replace(path)


def sync(path: Path) -> None:
    """Flush a file's or directory's contents to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def staged_directory(staging: Path) -> Iterator[Path]:
    """A new directory of this process, to fill and rename; removed afterwards if it was not."""
    staged = Path(tempfile.mkdtemp(dir=staging, prefix=owner()))
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def owner() -> str:
    """How the names begin of what this process stages."""
    return f"{this_process()}-"


def remove_stale_staging(staging: Path) -> None:
    """Remove what processes that were killed left in staging, where that is there."""
    for staged in staging.iterdir() if staging.is_dir() else ():
        with contextlib.suppress(OSError):  # swept by another, or not ours to remove
            alive = is_alive(staged.name.rpartition("-")[0])
            if alive is None:  # of another container, or from before this machine's start
                alive = time.time() - staged.stat().st_mtime < ABANDONED
            if not alive and staged.is_dir():
                shutil.rmtree(staged, ignore_errors=True)
            elif not alive:
                staged.unlink()
