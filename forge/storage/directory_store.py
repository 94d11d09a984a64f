"""The embedded object store: a directory. Its contents are always complete: staged, synced, and then renamed."""

import contextlib
import errno
import functools
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock

from forge.core.errors import ForgeError
from forge.core.full_disk import explain_full_disk
from forge.core.settings import path_of
from forge.storage.artifacts import StoredArtifact
from forge.storage.files import owner, remove_stale_staging, staged_directory, sync
from forge.storage.manifest import MANIFEST, missing_artifact, read_manifest, write_manifest

TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # errors of a rename to what exists


class DirectoryStore:
    """Objects under a root directory, addressed by file:// URIs.

    The directory is created when something is first written or staged.
    """

    conditional_writes = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = root / ".staging"
        remove_stale_staging(self._staging)

    @functools.cached_property
    def identity(self) -> str:
        """A random ID that is created with the store, when first asked for, and lost with it.

        Raises ForgeError if there is none yet and the directory cannot be written.
        """
        self.put_if_absent("identity", uuid.uuid4().hex.encode())
        return (self.root / "identity").read_text(encoding="utf-8")

    def uri(self, key: str) -> str:
        """The URI of a key."""
        return (self.root / key).as_uri()

    def read(self, key: str) -> bytes | None:
        """A small object, or None if it does not exist."""
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, replacing the old one. Readers see either of them whole."""
        target = self.root / key
        with self._staged_file(target, data) as staged:
            os.replace(staged, target)
        sync(target.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object; False, and nothing changes, if it exists. Readers never see part of it."""
        target = self.root / key
        if target.exists():
            return False
        with self._staged_file(target, data) as staged:
            try:
                os.link(staged, target)  # unlike a rename, fails if the target exists
            except FileExistsError:
                return False
        sync(target.parent)
        return True

    def read_version(self, key: str) -> tuple[bytes, str] | None:
        """A small object and its version for `put_if_unchanged`, or None if it does not exist."""
        data = self.read(key)
        return None if data is None else (data, hashlib.sha256(data).hexdigest())

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> bool:
        """Replace this version of a small object ("": create it); False, and nothing changes, if it has changed."""
        target = self.root / key
        with self._staged_file(target, data) as staged, self._locked():
            _, present = self.read_version(key) or (b"", "")
            if present != version:
                return False
            os.replace(staged, target)
        sync(target.parent)
        return True

    def names(self, key: str) -> list[str]:
        """The names of the small objects directly under a key, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.name for path in (self.root / key).iterdir() if path.is_file())
        return []

    def delete(self, key: str) -> None:
        """Delete a small object if it exists."""
        (self.root / key).unlink(missing_ok=True)

    def stage(self, what: str = "an artifact") -> contextlib.AbstractContextManager[Path]:
        """A new directory on the store's file system, to fill and publish; deleted afterwards unless published.

        Raises ForgeError if the store cannot be written. If the disk becomes full, the error names `what`.
        """
        return staged_directory(self._writable_staging(), what)

    def exists(self, key: str) -> bool:
        """Whether there is an object or a directory with this key."""
        return (self.root / key).exists()

    def publish(
        self,
        staged: Path,
        prefix: str,
        digest: str = "",
        facts: dict[str, Any] | None = None,
        seal: Callable[[Path], None] = lambda staged: None,
    ) -> str:
        """Move a staged directory to <prefix>/sha256-<digest>, complete, and return its URI.

        The digest is that of all files, unless another one is given. If the key exists already, that artifact stays.
        `seal` is called with the directory after its manifest has been written.
        """
        manifest = write_manifest(staged, facts or {})
        seal(staged)
        target = self.root / prefix / f"sha256-{digest or manifest['digest']}"
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in [*staged.rglob("*"), staged]:
            sync(path)
        if not target.exists():
            try:
                os.rename(staged, target)
            except OSError as error:
                if error.errno not in TAKEN:  # else another process was faster
                    raise
        if not target.is_dir():
            raise ForgeError(
                f"{target} could not be written", where="store", fix="delete the file of that name, if there is one"
            )
        sync(target.parent)
        return target.as_uri()

    def path(self, uri: str) -> Path:
        """The local path of an object or directory; raises ForgeError if it does not exist."""
        path = path_of(uri)
        if not path.exists():
            raise missing_artifact(uri)
        return path

    def release(self, uri: str) -> None:
        """Nothing to do: there are no local copies."""

    def manifest(self, uri: str) -> dict[str, Any]:
        """An artifact's manifest; raises ForgeError if the artifact is missing or the manifest is broken."""
        path = self.path(uri)
        try:
            return read_manifest(uri, (path / MANIFEST).read_bytes())
        except OSError:
            raise ForgeError(f"{MANIFEST} is missing", where=uri, fix="delete it and run again") from None

    def part(self, uri: str, name: str) -> bytes | None:
        """A small file of an artifact; None if the file or the artifact does not exist."""
        with contextlib.suppress(FileNotFoundError):
            return (path_of(uri) / name).read_bytes()
        return None

    def attach(self, uri: str, name: str, data: bytes) -> None:
        """Add a file to an artifact that its manifest does not list, such as a signature."""
        self.put(f"{self.path(uri).relative_to(self.root).as_posix()}/{name}", data)

    def artifacts(self, prefix: str) -> list[StoredArtifact]:
        """The artifacts under a prefix, sorted by URI. All of them are complete."""
        found = []
        for path in (self.root / prefix).rglob(MANIFEST):
            if path.parent.name.startswith("sha256-"):
                size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
                modified = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                found.append(StoredArtifact(path.parent.as_uri(), size, modified, True))
        return sorted(found)

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """Nothing to do: what killed processes have staged is deleted whenever the store is opened."""
        return 0

    def remove(self, uri: str) -> None:
        """Delete an artifact if it exists."""
        target = path_of(uri)
        with self.stage() as staged, contextlib.suppress(FileNotFoundError):
            target.rename(staged / target.name)

    @contextlib.contextmanager
    def _staged_file(self, target: Path, data: bytes) -> Iterator[str]:
        """A synced temporary file with the data, to be moved or linked to its target."""
        staging = self._writable_staging()
        with explain_full_disk(self.root, target.name, len(data)):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, staged = tempfile.mkstemp(dir=staging, prefix=owner())
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield staged
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(staged)

    def _writable_staging(self) -> Path:
        """The staging directory, created if need be; raises ForgeError if the store cannot be written."""
        try:
            with explain_full_disk(self.root, "the store"):
                self._staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ForgeError(
                f"cannot be written ({error.strerror})",
                where=f"store {self.root}",
                fix="make it writable, or set FORGE_HOME",
            ) from None
        return self._staging

    def _locked(self) -> FileLock:
        """Excludes other processes that compare and replace; the kernel releases it when a process ends."""
        return FileLock(self.root / ".lock")
