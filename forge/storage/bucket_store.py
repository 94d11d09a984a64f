"""A store in an S3 bucket. An artifact exists once its manifest does, and is read from a verified local copy."""

import contextlib
import functools
import hashlib
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.storage import s3
from forge.storage.artifacts import ARTIFACT, StoredArtifact
from forge.storage.local_copies import Copies
from forge.storage.manifest import MANIFEST, SIGNATURE, missing_artifact, read_manifest, write_manifest
from forge.storage.s3_errors import Damaged
from forge.storage.transfer import File, download, matches_etag, upload
from forge.storage.transfer_progress import show_progress

if TYPE_CHECKING:
    from minio import Minio


class BucketStore:
    """Objects under s3://bucket/prefix, addressed by s3:// URIs.

    All methods raise ForgeError if the bucket cannot be read or written.
    """

    def __init__(self, root: str, settings: Settings) -> None:
        self.root, self.settings = root, settings
        self.bucket, self.prefix = s3.split(root)
        place = hashlib.sha256(f"{settings.s3_endpoint} {root}".encode()).hexdigest()[:16]
        self.copies = Copies(settings.home / "copies" / place, int(settings.copies_gb * 1e9))

    @functools.cached_property
    def identity(self) -> str:
        """A random ID that is created with the store, when first asked for, and lost with it."""
        identity = self.read("identity")
        if identity is None:
            self.put_if_absent("identity", uuid.uuid4().hex.encode())
            identity = self.read("identity") or b""  # another process may have been faster
        return identity.decode()

    @functools.cached_property
    def conditional_writes(self) -> bool:
        """Whether `put_if_unchanged` can be relied on. To find out, an object is written under leases/ and deleted."""
        with self._connect() as client:
            return s3.honours_conditions(client, self.bucket, self._name(f"leases/probe-{uuid.uuid4().hex}"))

    def uri(self, key: str) -> str:
        """The URI of a key."""
        return f"{self.root}/{key}"

    def read(self, key: str) -> bytes | None:
        """A small object, or None if it does not exist."""
        with self._connect() as client:
            return s3.read_object(client, self.bucket, self._name(key))

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, replacing the old one."""
        with self._connect() as client:
            s3.put_object(client, self.bucket, self._name(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object; False, and nothing changes, if it exists."""
        with self._connect() as client:
            return s3.put_if_absent(client, self.bucket, self._name(key), data)

    def read_version(self, key: str) -> tuple[bytes, str] | None:
        """A small object and its version for `put_if_unchanged`, or None if it does not exist."""
        with self._connect() as client:
            return s3.read_with_etag(client, self.bucket, self._name(key))

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> bool:
        """Replace this version of a small object ("": create it); False, and nothing changes, if it has changed.

        Only to be used if the store has `conditional_writes`.
        """
        with self._connect() as client:
            return s3.put_if_unchanged(client, self.bucket, self._name(key), data, version)

    def names(self, key: str) -> list[str]:
        """The names of the small objects directly under a key, sorted."""
        prefix = self._name(f"{key}/")
        with self._connect() as client:
            names = [item.object_name or "" for item in client.list_objects(self.bucket, prefix=prefix)]
        return sorted(name.removeprefix(prefix) for name in names if not name.endswith("/"))

    def delete(self, key: str) -> None:
        """Delete a small object if it exists."""
        with self._connect() as client:
            client.remove_object(self.bucket, self._name(key))

    def stage(self, what: str = "an artifact") -> contextlib.AbstractContextManager[Path]:
        """A new local directory, to fill and publish; deleted afterwards unless published.

        If the disk becomes full, the error names `what`.
        """
        return self.copies.stage(what)

    def exists(self, key: str) -> bool:
        """Whether there is a complete artifact with this key."""
        with self._connect() as client:
            return s3.exists(client, self.bucket, self._name(f"{key}/{MANIFEST}"))

    def publish(
        self,
        staged: Path,
        prefix: str,
        digest: str = "",
        facts: dict[str, Any] | None = None,
        seal: Callable[[Path], None] = lambda staged: None,
    ) -> str:
        """Send a staged directory to <prefix>/sha256-<digest>, its manifest last, and return its URI.

        The digest is that of all files, unless another one is given. If the key exists already, that artifact stays.
        Files that an earlier attempt has sent are not sent again. `seal` is called with the directory once its manifest
        has been written, before anything is sent.
        """
        manifest = write_manifest(staged, facts or {})
        seal(staged)
        key = f"{prefix}/sha256-{digest or manifest['digest']}"
        with self._connect() as client:
            if not s3.exists(client, self.bucket, self._name(f"{key}/{MANIFEST}")):
                folder = self._folder(key, manifest)
                self._send(client, staged, key, folder, manifest["files"])
                if (staged / SIGNATURE).is_file():
                    self.put(f"{key}/{SIGNATURE}", (staged / SIGNATURE).read_bytes())
                data = (staged / MANIFEST).read_bytes()
                s3.put_if_absent(client, self.bucket, self._name(f"{key}/{MANIFEST}"), data)
            kept = s3.read_object(client, self.bucket, self._name(f"{key}/{MANIFEST}"))
        read_manifest(self.uri(key), kept or b"")
        if kept == (staged / MANIFEST).read_bytes():
            self.copies.adopt(key, staged)
        return self.uri(key)

    def path(self, uri: str) -> Path:
        """The local path of an artifact or of a file in it, fetched and verified. Raises ForgeError if missing."""
        key = self._key(uri)
        found = ARTIFACT.match(key)
        if found is None:
            raise missing_artifact(uri)
        artifact = found.group()
        path = self.copies.get(artifact, lambda directory: self._fetch(artifact, directory))
        return path / key[len(artifact) :].lstrip("/")

    def release(self, uri: str) -> None:
        """Stop using an artifact's local copy, which may then be evicted."""
        if found := ARTIFACT.match(self._key(uri)):
            self.copies.release(found.group())

    def manifest(self, uri: str) -> dict[str, Any]:
        """An artifact's manifest; raises ForgeError if the artifact is missing or the manifest is broken."""
        data = self.read(f"{self._key(uri)}/{MANIFEST}")
        if data is None:
            raise missing_artifact(uri)
        return read_manifest(uri, data)

    def part(self, uri: str, name: str) -> bytes | None:
        """A small file of an artifact, without the others; None if the file or the artifact does not exist."""
        data = self.read(f"{self._key(uri)}/{MANIFEST}")
        if data is None:
            return None
        with self._connect() as client:
            folder = self._folder(self._key(uri), read_manifest(uri, data))
            return s3.read_object(client, self.bucket, f"{folder}/{name}")

    def attach(self, uri: str, name: str, data: bytes) -> None:
        """Add a file to an artifact that its manifest does not list, such as a signature."""
        self.put(f"{self._key(uri)}/{name}", data)

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """Abort the uploads under a prefix that were interrupted longer ago; returns their number."""
        with self._connect() as client:
            return s3.abort_stale_uploads(client, self.bucket, self._name(f"{prefix}/"), older_than)

    def artifacts(self, prefix: str) -> list[StoredArtifact]:
        """The artifacts under a prefix, including those whose upload was interrupted, sorted by URI."""
        found: dict[str, StoredArtifact] = {}
        with self._connect() as client:
            for item in client.list_objects(self.bucket, prefix=self._name(f"{prefix}/"), recursive=True):
                key = (item.object_name or "").removeprefix(self._name(""))
                if (artifact := ARTIFACT.match(key)) and item.last_modified:
                    uri = self.uri(artifact.group())
                    known = found.get(uri, StoredArtifact(uri, 0, item.last_modified, False))
                    found[uri] = StoredArtifact(
                        uri,
                        known.size + (item.size or 0),
                        max(known.modified, item.last_modified),
                        known.whole or key == f"{artifact.group()}/{MANIFEST}",
                    )
        return sorted(found.values())

    def remove(self, uri: str) -> None:
        """Delete an artifact if it exists, its manifest first."""
        key = self._key(uri)
        self.copies.remove(key)
        with self._connect() as client:
            client.remove_object(self.bucket, self._name(f"{key}/{MANIFEST}"))
            for item in list(client.list_objects(self.bucket, prefix=self._name(f"{key}/"), recursive=True)):
                client.remove_object(self.bucket, item.object_name or "")

    def _fetch(self, key: str, directory: Path) -> None:
        """Download an artifact to a directory."""
        where = self.uri(key)
        with self._connect() as client:
            data = s3.read_object(client, self.bucket, self._name(f"{key}/{MANIFEST}"))
            if data is None:
                raise missing_artifact(where)
            manifest = read_manifest(where, data)
            folder = self._folder(key, manifest)
            files = self._listed(client, where, folder, manifest["files"])
            if signature := s3.read_object(client, self.bucket, self._name(f"{key}/{SIGNATURE}")):
                (directory / SIGNATURE).write_bytes(signature)
            self.copies.make_room(key, sum(file.size for file in files))
            targets = [(file, directory / file.name.removeprefix(f"{folder}/")) for file in files]
            try:
                with show_progress(f"fetch {key}", sum(file.size for file in files)) as report:
                    download(client, self.bucket, targets, report)
            except Damaged as error:
                raise ForgeError(
                    f"{where}: {str(error).removeprefix(f'{folder}/')} is damaged, in the store or by the network",
                    where="store",
                    fix="run again, and if that does not help, delete the artifact",
                ) from None
        (directory / MANIFEST).write_bytes(data)

    def _listed(self, client: "Minio", where: str, folder: str, entries: list[dict[str, Any]]) -> list[File]:
        """The files of an artifact. Raises ForgeError unless the bucket has just the files of the manifest."""

        def bad(what: str) -> ForgeError:
            return ForgeError(f"{where}: {what}", where="store", fix="delete the artifact and run again")

        listed = client.list_objects(self.bucket, prefix=f"{folder}/", recursive=True)
        present = {(item.object_name or "").removeprefix(f"{folder}/"): item for item in listed}
        for name in sorted(present.keys() - {MANIFEST, SIGNATURE} - {entry["path"] for entry in entries}):
            raise bad(f"{name} is not in the manifest")
        files = []
        for entry in entries:
            name, size = entry["path"], entry["size"]
            if (item := present.get(name)) is None:
                raise bad(f"{name} is missing")
            if item.size != size:
                raise bad(f"{name} has {item.size} bytes, and its manifest says {size}")
            files.append(File(item.object_name or "", size, (item.etag or "").strip('"'), entry["sha256"]))
        return files

    def _send(self, client: "Minio", staged: Path, key: str, folder: str, entries: list[dict[str, Any]]) -> None:
        """Upload the files of a staged directory that the bucket does not have yet."""
        listed = client.list_objects(self.bucket, prefix=f"{folder}/", recursive=True)
        present = {item.object_name: (item.size, (item.etag or "").strip('"')) for item in listed}
        files = []
        for entry in entries:
            path, name = staged / entry["path"], f"{folder}/{entry['path']}"
            size, etag = present.get(name, (None, ""))
            if size != entry["size"] or not matches_etag(path, etag):
                files.append((path, File(name, entry["size"], sha256=entry["sha256"])))
        with show_progress(f"send {key}", sum(file.size for _, file in files)) as report:
            upload(client, self.bucket, files, report)

    def _folder(self, key: str, manifest: dict[str, Any]) -> str:
        """The prefix of an artifact's files: that of its manifest, if the key is the digest of the files.

        If it is another digest, two artifacts with the same key may differ. Each has its own folder then, and the one
        whose manifest was first exists.
        """
        digest = str(manifest["digest"])
        return self._name(key if key.endswith(f"/sha256-{digest}") else f"{key}/{digest[:16]}")

    def _key(self, uri: str) -> str:
        if not uri.startswith(f"{self.root}/"):
            raise ForgeError(
                f"{uri} is not in {self.root}", where="store", fix="set FORGE_STORE to the store that contains it"
            )
        return uri.removeprefix(f"{self.root}/")

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}".lstrip("/")

    def _connect(self) -> contextlib.AbstractContextManager["Minio"]:
        return s3.connect(f"store {self.root}", self.settings, s3.SENDING)
