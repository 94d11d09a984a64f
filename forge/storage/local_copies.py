"""Local copies of artifacts that are kept elsewhere: whole, verified, and no more of them than there is room for."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from forge.storage.files import remove_stale_staging, staged_directory, sync


class Copies:
    """Directories by key, of so many bytes in all; those that were not used for longest go first.

    A copy is locked while the process lives that asked for it (shared, by the kernel), and then is not removed.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._staging, self._users, self._fetching = root / ".staging", root / ".users", root / ".fetching"
        for directory in (self._staging, self._users, self._fetching):
            directory.mkdir(parents=True, exist_ok=True)
        self._held: dict[str, int] = {}
        self._mutex = threading.Lock()  # the kernel's locks are between processes
        remove_stale_staging(self._staging)

    def stage(self) -> contextlib.AbstractContextManager[Path]:
        """A new directory beside the copies; removed afterwards, if it has not become one."""
        return staged_directory(self._staging)

    def get(self, key: str, fetch: Callable[[Path], None]) -> Path:
        """The copy of a key, fetched into a new directory first where there is none. One process fetches it."""
        with self._used(key) as target:
            if not target.is_dir():
                with FileLock(self._fetching / _flat(key)), self.stage() as staged:
                    if not target.is_dir():  # while we waited, another process may have fetched it
                        fetch(staged)
                        self._place(staged, target)
        return target

    def adopt(self, key: str, staged: Path) -> None:
        """Make a staged directory the copy of a key, where there is none."""
        with self._used(key) as target, FileLock(self._fetching / _flat(key)):
            if not target.is_dir():
                self._place(staged, target)

    def release(self, key: str) -> None:
        """Let go of a copy, which may make room for others from then on."""
        with self._mutex:
            if (handle := self._held.pop(key, None)) is not None:
                os.close(handle)

    def remove(self, key: str) -> None:
        """Remove the copy of a key; nothing happens where there is none, or another process uses it."""
        with self._mutex:
            if (handle := self._held.pop(key, None)) is not None:
                os.close(handle)
            self._remove_unused(key)

    @contextlib.contextmanager
    def _used(self, key: str) -> Iterator[Path]:
        """Keep a key's copy, which is given its place meanwhile, from being removed; others then make room for it."""
        with self._mutex:
            if key not in self._held:
                self._held[key] = self._locked(key, fcntl.LOCK_SH)
            target = self.root / key
            there = target.is_dir()
            yield target
            os.utime(self._users / _flat(key))
            if not there:
                self._make_room()

    def _locked(self, key: str, how: int) -> int:
        handle = os.open(self._users / _flat(key), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, how)
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

    def _make_room(self) -> None:
        """Remove copies that no process uses, the longest unused first, until the rest is within the limit."""
        users = sorted(self._users.iterdir(), key=lambda user: user.stat().st_mtime)
        sizes = {user.name.replace("~", "/"): _bytes(self.root / user.name.replace("~", "/")) for user in users}
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total > self.limit and key not in self._held and self._remove_unused(key):
                total -= size

    def _remove_unused(self, key: str) -> bool:
        """Remove a copy, unless another process uses it."""
        try:
            handle = self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        with self.stage() as staged, contextlib.suppress(FileNotFoundError):
            (self.root / key).rename(staged / "copy")
        os.close(handle)
        return True


def _flat(key: str) -> str:
    """A key as a file's name."""
    return key.replace("/", "~")


def _bytes(directory: Path) -> int:
    """The size of a directory's files; 0 where it is not there."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
