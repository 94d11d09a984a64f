"""A full disk: one error that names the disk, what was being written to it, and how much is free.

Libraries hide the system's error: numpy says how many bytes it asked for, torch and safetensors have texts of their
own, and what catches an OSError reports it as its own failure. So the whole chain of errors is looked at.
"""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from forge.core.errors import ForgeError

REASONS = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "has no more room for this user, whose quota is used up",
    errno.EFBIG: "takes no file that large (ulimit -f, or a limit of its file system)",
}
TEXTS = {
    errno.EFBIG: re.compile("file too large", re.IGNORECASE),
    errno.EDQUOT: re.compile("disk quota exceeded", re.IGNORECASE),
    errno.ENOSPC: re.compile(
        r"no space left on device|database or disk is full|\d+ requested and \d+ written"  # numpy
        r"|PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+",
        re.IGNORECASE,
    ),
}
ROOM = 1 << 20  # bytes; a disk with more is not the full one, unless more was wanted
UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))
FIX = "free space there, or set FORGE_HOME to a directory on another disk"
TEMPORARY = "free space there, or set TMPDIR to a directory on another disk"


class DiskFull(ForgeError):
    """A disk, or the user's share of it, is full."""


@contextlib.contextmanager
def explain_full_disk(path: Path, what: str, wanted: int = 0, fix: str = FIX) -> Iterator[None]:
    """Raise DiskFull for any error that comes from a full disk while `what` is written to `path`.

    `wanted` is the number of bytes that will be written, if it is known.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if number := full_disk_error(error):
            raise _explained(error, number, path, what, wanted, fix) from None
        raise


@contextlib.contextmanager
def temporary_directory(prefix: str, what: str) -> Iterator[Path]:
    """A new directory for temporary files, deleted afterwards. Raises DiskFull if its disk becomes full."""
    place = Path(tempfile.gettempdir())
    with (
        explain_full_disk(place, what, fix=TEMPORARY),
        tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder,
        explain_full_disk(place, what, fix=TEMPORARY),  # says how much was free before the directory is deleted
    ):
        yield Path(folder)


def check_free_space(path: Path, what: str, wanted: int, fix: str = FIX) -> None:
    """Raise DiskFull unless the disk of a path has room for `wanted` bytes."""
    if wanted > free_space(path):
        raise _disk_full(errno.ENOSPC, path, what, wanted, fix)


def full_disk_error(error: BaseException) -> int:
    """The error number if an error comes from a full disk, whatever has been made of it since; else 0."""
    seen: set[int] = set()
    chained: BaseException | None = error
    while chained is not None and id(chained) not in seen:
        seen.add(id(chained))
        number = chained.errno if isinstance(chained, OSError) else None
        if number in REASONS:
            return number
        for number, text in TEXTS.items():
            if text.search(str(chained)):
                return number
        chained = chained.__cause__ or chained.__context__
    return 0


def _explained(error: BaseException, number: int, path: Path, what: str, wanted: int, fix: str) -> DiskFull:
    """The error for the disk that is full: that of the file in the error, of `path`, or of temporary files."""
    if isinstance(error, OSError) and isinstance(error.filename, str):
        return _disk_full(number, Path(error.filename), what, wanted, fix)
    temporary = Path(tempfile.gettempdir())
    if number == errno.ENOSPC and free_space(path) > max(ROOM, wanted) and free_space(temporary) < ROOM:
        return _disk_full(number, temporary, what, wanted, TEMPORARY)
    return _disk_full(number, path, what, wanted, fix)


def _disk_full(number: int, path: Path, what: str, wanted: int, fix: str) -> DiskFull:
    free = f"{_size(free_space(path))} free" + (f", {_size(wanted)} wanted" if wanted else "")
    if number == errno.ENOSPC and _no_files_left(path):
        free += ", but it takes no more files"
    return DiskFull(f"{REASONS[number]} ({free}): {what} cannot be written to {path}", where=_disk(path), fix=fix)


def _disk(path: Path) -> str:
    """The name of the disk that a path is on, or will be: its mount point."""
    return f"disk {next(one for one in (existing(path), *existing(path).parents) if one.is_mount())}"


def free_space(path: Path) -> int:
    """The bytes that this user may still write where a path is, or will be."""
    found = os.statvfs(existing(path))
    return found.f_bavail * found.f_frsize


def _no_files_left(path: Path) -> bool:
    """Whether the file system counts its files, and has reached their number."""
    found = os.statvfs(existing(path))
    return found.f_files > 0 and found.f_favail == 0


def existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if os.path.exists(one))  # Path's own raises for a closed parent


def _size(count: int) -> str:
    """A number of bytes in the largest unit that leaves one or more."""
    size, unit = next(((size, unit) for size, unit in UNITS if count >= size), UNITS[-1])
    return f"{count / size:.1f} {unit}" if size > 1 else f"{count} {unit}"
