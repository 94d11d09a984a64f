"""Files and directories that are either complete or absent, also after a power failure."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from forge.core.full_disk import explain_full_disk
from forge.core.processes import is_alive, this_process

ABANDONED = 3 * 24 * 3600  # seconds; no stage takes that long


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace a small file so that readers see either the old or the new text; creates its directory if need be.

    A `durable` file survives a power failure. Flushing it may take a second if the disk is busy.
    """
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    with explain_full_disk(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_text(text, encoding="utf-8")
            if durable:
                sync(staged)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's or directory's contents to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def staged_directory(staging: Path, what: str) -> Iterator[Path]:
    """A new directory of this process, to fill with `what` and rename; deleted afterwards unless renamed.

    Raises DiskFull if the disk is full.
    """
    with explain_full_disk(staging, what):
        staged = Path(tempfile.mkdtemp(dir=staging, prefix=owner()))
    try:
        with explain_full_disk(staging, what):  # says how much was free before the directory is deleted
            yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def owner() -> str:
    """The prefix of the names of all that this process stages."""
    return f"{this_process()}-"


def remove_stale_staging(staging: Path) -> None:
    """Delete what killed processes have left in a staging directory, if it exists."""
    for staged in staging.iterdir() if staging.is_dir() else ():
        with contextlib.suppress(OSError):  # deleted by another process, or not ours to delete
            alive = is_alive(staged.name.rpartition("-")[0])
            if alive is None:  # from another container, or from before the last boot
                alive = time.time() - staged.stat().st_mtime < ABANDONED
            if not alive and staged.is_dir():
                shutil.rmtree(staged, ignore_errors=True)
            elif not alive:
                staged.unlink()
