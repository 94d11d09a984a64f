"""The embedded object store: a directory. Whatever is in it is complete: written apart, synced, renamed into place."""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil

from tasks.errors import ForgeError
from tasks.storage.digest import digest_directory
from tasks.storage.files import sync


class DirectoryStore:
    """Objects under a root directory, addressed by file:// URIs.

    `identity` is made once for each store and is lost with it. ForgeError where the directory cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            self.put_if_absent("identity", uuid.uuid4().hex.encode())
        except OSError as error:
            raise ForgeError(
                f"store {root}: cannot be written ({error.strerror}); make it writable, or set FORGE_HOME"
            ) from None
        self.identity = (root / "identity").read_text()
        self._sweep()

    @property
    def _staging(self) -> Path:
        return self.root / ".staging"

    def uri(self, key: str) -> str:
        """The URI of a key."""
        return (self.root / key).as_uri()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write one object; False, and nothing changed, where it already exists. Readers never see half of it."""
        target = self.root / key
        if target.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(dir=self._staging)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(staged, target)  # unlike a rename, fails where the target exists
        except FileExistsError:
            return False
        finally:
            os.unlink(staged)
        sync(target.parent)
        return True

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        """A new directory on the store's file system, to fill and publish; removed afterwards if it was not."""
        staged = Path(tempfile.mkdtemp(dir=self._staging, prefix=f"{os.getpid()}-"))
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what processes that were killed left in staging."""
        for staged in self._staging.iterdir():
            owner = staged.name.split("-")[0]
            if owner.isdigit() and not psutil.pid_exists(int(owner)):
                shutil.rmtree(staged, ignore_errors=True)

    def exists(self, key: str) -> bool:
        """Whether there is an object or a directory of this key."""
        return (self.root / key).exists()

    def publish(self, staged: Path, prefix: str, digest: str = "") -> str:
        """Move a staged directory to <prefix>/sha256-<digest>, whole, and return its URI.

        The digest is that of all its files, unless another one is given. Where the key exists already, that copy
        stays.
        """
        target = self.root / prefix / f"sha256-{digest or digest_directory(staged)[0]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in [*staged.rglob("*"), staged]:
            sync(path)
        if not target.exists():
            with contextlib.suppress(OSError):  # lost a race: the directory is there now
                os.rename(staged, target)
        if not target.is_dir():
            raise ForgeError(f"store: {target} could not be written; is there a file of that name?")
        sync(target.parent)
        return target.as_uri()

    def remove(self, uri: str) -> None:
        """Remove a published directory; nothing happens where it is gone already."""
        target = Path(unquote(urlsplit(uri).path))
        with self.stage() as staged, contextlib.suppress(FileNotFoundError):
            target.rename(staged / target.name)

    def path(self, uri: str) -> Path:
        """The local path of an object or directory; ForgeError where it is not there."""
        path = Path(unquote(urlsplit(uri).path))
        if not path.exists():
            raise ForgeError(
                f"store: {path} is gone, though an earlier run made it; to make it again, run with --overwrite-cache "
                "(pyflyte run --overwrite-cache ...)"
            )
        return path
