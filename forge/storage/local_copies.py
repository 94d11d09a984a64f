"""Local copies of artifacts in a bucket: complete, verified, and evicted if they take up too much space."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from forge.core.errors import ForgeError
from forge.core.full_disk import check_free_space, explain_full_disk, free_space
from forge.storage.files import remove_stale_staging, staged_directory, sync

FIX = "free space there, lower FORGE_COPIES_GB, or set FORGE_HOME to a directory on another disk"


class Copies:
    """Directories by key, with `limit` bytes in all. The least recently used are evicted first.

    A process that asks for a copy holds a shared lock of the kernel on it until it ends. Locked copies stay.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._staging, self._users, self._fetching = root / ".staging", root / ".users", root / ".fetching"
        try:
            with explain_full_disk(root, "local copies"):
                for directory in (self._staging, self._users, self._fetching):
                    directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ForgeError(
                f"cannot be written ({error.strerror})",
                where=f"local copies {root}",
                fix="make it writable, or set FORGE_HOME",
            ) from None
        self._held: dict[str, int] = {}
        self._mutex = threading.Lock()  # the kernel locks exclude processes, not threads
        remove_stale_staging(self._staging)

    def stage(self, what: str) -> contextlib.AbstractContextManager[Path]:
        """A new directory for `what`, to become a copy; deleted afterwards unless it has."""
        return staged_directory(self._staging, what)

    def get(self, key: str, fetch: Callable[[Path], None]) -> Path:
        """The copy of a key. If there is none, one process fetches it into a new directory."""
        with explain_full_disk(self.root, f"the local copy of {key}", fix=FIX), self._used(key) as target:
            if not target.is_dir():
                with FileLock(self._fetching / _flat(key)), self.stage(f"the local copy of {key}") as staged:
                    if not target.is_dir():  # another process may just have fetched it
                        fetch(staged)
                        self._place(staged, target)
        return target

    def make_room(self, key: str, size: int) -> None:
        """Evict copies until the disk has room for a copy that is being fetched; DiskFull if too few can be evicted."""
        free = free_space(self.root)
        if free < size:
            self._evict(sum(self._sizes().values()) - (size - free))
        check_free_space(self.root, f"the local copy of {key}", size, FIX)

    def adopt(self, key: str, staged: Path) -> None:
        """Make a staged directory the copy of a key, if there is none."""
        with (
            explain_full_disk(self.root, f"the local copy of {key}", fix=FIX),
            self._used(key) as target,
            FileLock(self._fetching / _flat(key)),
        ):
            if not target.is_dir():
                self._place(staged, target)

    def release(self, key: str) -> None:
        """Stop using a copy, which may then be evicted."""
        with self._mutex:
            if (handle := self._held.pop(key, None)) is not None:
                os.close(handle)

    def remove(self, key: str) -> None:
        """Delete the copy of a key, if there is one that no other process uses."""
        with self._mutex:
            if (handle := self._held.pop(key, None)) is not None:
                os.close(handle)
            self._remove_unused(key)

    @contextlib.contextmanager
    def _used(self, key: str) -> Iterator[Path]:
        """Lock the copy of a key, which the caller puts in place. If it is new, others are evicted afterwards."""
        with self._mutex:
            if key not in self._held:
                self._held[key] = self._locked(key, fcntl.LOCK_SH)
            target = self.root / key
            is_new = not target.is_dir()
            yield target
            os.utime(self._users / _flat(key))
            if is_new:
                self._evict(self.limit)

    def _locked(self, key: str, mode: int) -> int:
        handle = os.open(self._users / _flat(key), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, mode)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _place(self, staged: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in [*staged.rglob("*"), staged]:
            sync(path)
        os.rename(staged, target)
        sync(target.parent)

    def _evict(self, limit: int) -> None:
        """Delete copies that no process uses, the least recently used first, until they take up at most `limit`."""
        sizes = self._sizes()
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total > limit and key not in self._held and self._remove_unused(key):
                total -= size

    def _sizes(self) -> dict[str, int]:
        """The bytes of each copy, the least recently used first."""
        users = sorted(self._users.iterdir(), key=lambda user: user.stat().st_mtime)
        return {user.name.replace("~", "/"): _bytes(self.root / user.name.replace("~", "/")) for user in users}

    def _remove_unused(self, key: str) -> bool:
        """Delete a copy, unless another process uses it."""
        try:
            handle = self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        with self.stage("") as staged, contextlib.suppress(FileNotFoundError):
            (self.root / key).rename(staged / "copy")
        os.close(handle)
        return True


def _flat(key: str) -> str:
    """A key as a file name."""
    return key.replace("/", "~")


def _bytes(directory: Path) -> int:
    """The size of a directory's files; 0 if it does not exist."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # just deleted
            total += path.stat().st_size if path.is_file() else 0
    return total
