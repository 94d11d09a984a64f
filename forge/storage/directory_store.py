"""The embedded object store: a directory. Whatever is in it is complete: written apart, synced, renamed into place."""

import contextlib
import functools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from forge.core.errors import ForgeError
from forge.storage.artifacts import StoredArtifact
from forge.storage.files import owner, remove_stale_staging, staged_directory, sync
from forge.storage.manifest import MANIFEST, gone, read_manifest, write_manifest


class DirectoryStore:
    """Objects under a root directory, addressed by file:// URIs.

    Its directory is made when something is first written or staged there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = root / ".staging"
        remove_stale_staging(self._staging)

    @functools.cached_property
    def identity(self) -> str:
        """Made once for each store, when it is first asked for, and lost with it.

        ForgeError where there is none and the directory cannot be written.
        """
        self.put_if_absent("identity", uuid.uuid4().hex.encode())
        return (self.root / "identity").read_text()

    def _made(self) -> Path:
        """The directory to stage in, made where it is not there; ForgeError where the store cannot be written."""
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ForgeError(
                f"store {self.root}: cannot be written ({error.strerror}); make it writable, or set FORGE_HOME"
            ) from None
        return self._staging

    def uri(self, key: str) -> str:
        """The URI of a key."""
        return (self.root / key).as_uri()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write one object; False, and nothing changed, where it already exists. Readers never see half of it."""
        target = self.root / key
        if target.exists():
            return False
        with self._small(target, data) as staged:
            try:
                os.link(staged, target)  # unlike a rename, fails where the target exists
            except FileExistsError:
                return False
        sync(target.parent)
        return True

    def put(self, key: str, data: bytes) -> None:
        """Write one object, in place of what is there. Readers never see half of it."""
        target = self.root / key
        with self._small(target, data) as staged:
            os.replace(staged, target)
        sync(target.parent)

    def names(self, key: str) -> list[str]:
        """The names of the small objects directly under a key, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.name for path in (self.root / key).iterdir() if path.is_file())
        return []

    def delete(self, key: str) -> None:
        """Remove a small object; nothing happens where there is none."""
        (self.root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _small(self, target: Path, data: bytes) -> Iterator[str]:
        """A synced file of its own that holds the data, to be moved or linked to its target."""
        staging = self._made()
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

    def stage(self) -> contextlib.AbstractContextManager[Path]:
        """A new directory on the store's file system, to fill and publish; removed afterwards if it was not.

        ForgeError where the store cannot be written.
        """
        return staged_directory(self._made())

    def exists(self, key: str) -> bool:
        """Whether there is an object or a directory of this key."""
        return (self.root / key).exists()

    def publish(
        self,
        staged: Path,
        prefix: str,
        digest: str = "",
        facts: dict[str, Any] | None = None,
        seal: Callable[[Path], None] = lambda staged: None,
    ) -> str:
        """Move a staged directory to <prefix>/sha256-<digest>, whole, and return its URI.

        The digest is that of all its files, unless another one is given. Where the key exists already, that copy
        stays. `seal` is given the directory when its manifest is written.
        """
        manifest = write_manifest(staged, facts or {})
        seal(staged)
        target = self.root / prefix / f"sha256-{digest or manifest['digest']}"
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

    def part(self, uri: str, name: str) -> bytes | None:
        """A small file of a published directory; None where it, or the directory, is not there."""
        with contextlib.suppress(FileNotFoundError):
            return (Path(unquote(urlsplit(uri).path)) / name).read_bytes()
        return None

    def attach(self, uri: str, name: str, data: bytes) -> None:
        """Put a file beside a published directory's own, such as a signature."""
        self.put(f"{self.path(uri).relative_to(self.root).as_posix()}/{name}", data)

    def artifacts(self, prefix: str) -> list[StoredArtifact]:
        """The artifacts under a prefix, sorted by URI; all of them are whole."""
        found = []
        for path in (self.root / prefix).rglob(MANIFEST):
            if path.parent.name.startswith("sha256-"):
                size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
                modified = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                found.append(StoredArtifact(path.parent.as_uri(), size, modified, True))
        return sorted(found)

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """Nothing: what processes left that were killed is swept whenever the store is opened."""
        return 0

    def remove(self, uri: str) -> None:
        """Remove a published directory; nothing happens where it is gone already."""
        target = Path(unquote(urlsplit(uri).path))
        with self.stage() as staged, contextlib.suppress(FileNotFoundError):
            target.rename(staged / target.name)

    def path(self, uri: str) -> Path:
        """The local path of an object or directory; ForgeError where it is not there."""
        path = Path(unquote(urlsplit(uri).path))
        if not path.exists():
            raise gone(uri)
        return path

    def release(self, uri: str) -> None:
        """Nothing to do: what is in this store is no copy."""

    def manifest(self, uri: str) -> dict[str, Any]:
        """An artifact's manifest; ForgeError where it is not there, or broken."""
        path = self.path(uri)
        try:
            return read_manifest(uri, (path / MANIFEST).read_bytes())
        except OSError:
            raise ForgeError(f"{uri}: {MANIFEST} is missing; delete it and run again") from None

    def read(self, key: str) -> bytes | None:
        """A small object, or None where there is none."""
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None
