"""An S3 bucket as the store. An artifact is there when its manifest is; it is read from a verified local copy."""

import contextlib
import functools
import hashlib
import io
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
from forge.storage.manifest import MANIFEST, SIGNATURE, gone, read_manifest, write_manifest
from forge.storage.transfer import File, download, is_etag_of, upload
from forge.storage.transfer_progress import shown

if TYPE_CHECKING:
    from minio import Minio


class BucketStore:
    """Objects under an s3://bucket/prefix, addressed by s3:// URIs. ForgeError where it cannot be read or written."""

    def __init__(self, root: str, settings: Settings) -> None:
        self.root, self.settings = root, settings
        self.bucket, self.prefix = s3.split(root)
        place = hashlib.sha256(f"{settings.s3_endpoint} {root}".encode()).hexdigest()[:16]
        self.copies = Copies(settings.home / "copies" / place, int(settings.copies_gb * 1e9))

    @functools.cached_property
    def identity(self) -> str:
        """Made once for each store, when it is first asked for, and lost with it."""
        identity = self.read("identity")
        if identity is None:
            self.put_if_absent("identity", uuid.uuid4().hex.encode())
            identity = self.read("identity") or b""  # another process may have been first
        return identity.decode()

    def uri(self, key: str) -> str:
        """The URI of a key."""
        return f"{self.root}/{key}"

    def read(self, key: str) -> bytes | None:
        """A small object, or None where there is none."""
        with self._connect() as client:
            return s3.read_object(client, self.bucket, self._name(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object; False, and nothing changed, where it already exists."""
        with self._connect() as client:
            return s3.put_if_absent(client, self.bucket, self._name(key), data)

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, in place of what is there."""
        with self._connect() as client:
            client.put_object(self.bucket, self._name(key), io.BytesIO(data), len(data))

    def names(self, key: str) -> list[str]:
        """The names of the small objects directly under a key, sorted."""
        prefix = self._name(f"{key}/")
        with self._connect() as client:
            names = [item.object_name or "" for item in client.list_objects(self.bucket, prefix=prefix)]
        return sorted(name.removeprefix(prefix) for name in names if not name.endswith("/"))

    def delete(self, key: str) -> None:
        """Remove a small object; nothing happens where there is none."""
        with self._connect() as client:
            client.remove_object(self.bucket, self._name(key))

    def stage(self) -> contextlib.AbstractContextManager[Path]:
        """A new local directory, to fill and publish; removed afterwards if it was not."""
        return self.copies.stage()

    def exists(self, key: str) -> bool:
        """Whether there is an artifact of this key, all of it."""
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

        The digest is that of all its files, unless another one is given. Where the key exists already, that copy
        stays. Files that an earlier attempt sent are not sent again. `seal` is given the directory when its manifest
        is written, before that is sent.
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
        """The local path of an artifact or a part of it, fetched and verified; ForgeError where it is not there."""
        key = self._key(uri)
        found = ARTIFACT.match(key)
        if found is None:
            raise gone(uri)
        artifact = found.group()
        path = self.copies.get(artifact, lambda directory: self._fetch(artifact, directory))
        return path / key[len(artifact) :].lstrip("/")

    def release(self, uri: str) -> None:
        """Let go of an artifact's local copy: it may make room for others from then on."""
        if found := ARTIFACT.match(self._key(uri)):
            self.copies.release(found.group())

    def manifest(self, uri: str) -> dict[str, Any]:
        """An artifact's manifest; ForgeError where it is not there, or broken."""
        data = self.read(f"{self._key(uri)}/{MANIFEST}")
        if data is None:
            raise gone(uri)
        return read_manifest(uri, data)

    def part(self, uri: str, name: str) -> bytes | None:
        """A small file of an artifact, without the others; None where it, or the artifact, is not there."""
        data = self.read(f"{self._key(uri)}/{MANIFEST}")
        if data is None:
            return None
        with self._connect() as client:
            folder = self._folder(self._key(uri), read_manifest(uri, data))
            return s3.read_object(client, self.bucket, f"{folder}/{name}")

    def attach(self, uri: str, name: str, data: bytes) -> None:
        """Put a file beside an artifact's own, such as a signature."""
        self.put(f"{self._key(uri)}/{name}", data)

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """Remove what uploads that were broken off so long ago left under a prefix; returns how many there were."""
        with self._connect() as client:
            return s3.abort_stale_uploads(client, self.bucket, self._name(f"{prefix}/"), older_than)

    def artifacts(self, prefix: str) -> list[StoredArtifact]:
        """The artifacts under a prefix, and what there is of those that are not whole; sorted by URI."""
        found: dict[str, StoredArtifact] = {}
        with self._connect() as client:
            for item in client.list_objects(self.bucket, prefix=self._name(f"{prefix}/"), recursive=True):
                key = (item.object_name or "").removeprefix(self._name(""))
                if (artifact := ARTIFACT.match(key)) and item.last_modified:
                    uri, size, whole = (
                        self.uri(artifact.group()),
                        item.size or 0,
                        key == f"{artifact.group()}/{MANIFEST}",
                    )
                    one = found.get(uri, StoredArtifact(uri, 0, item.last_modified, False))
                    modified = max(one.modified, item.last_modified)
                    found[uri] = StoredArtifact(uri, one.size + size, modified, one.whole or whole)
        return sorted(found.values())

    def remove(self, uri: str) -> None:
        """Remove an artifact, its manifest first; nothing happens where it is gone already."""
        key = self._key(uri)
        self.copies.remove(key)
        with self._connect() as client:
            client.remove_object(self.bucket, self._name(f"{key}/{MANIFEST}"))
            for item in list(client.list_objects(self.bucket, prefix=self._name(f"{key}/"), recursive=True)):
                client.remove_object(self.bucket, item.object_name or "")

    def _fetch(self, key: str, directory: Path) -> None:
        where = self.uri(key)
        with self._connect() as client:
            data = s3.read_object(client, self.bucket, self._name(f"{key}/{MANIFEST}"))
            if data is None:
                raise gone(where)
            manifest = read_manifest(where, data)
            folder = self._folder(key, manifest)
            listed = client.list_objects(self.bucket, prefix=f"{folder}/", recursive=True)
            there = {(item.object_name or "").removeprefix(f"{folder}/"): item for item in listed}
            for name in sorted(there.keys() - {MANIFEST, SIGNATURE} - {entry["path"] for entry in manifest["files"]}):
                raise ForgeError(f"store: {where}: {name} is not in the manifest; remove the artifact and run again")
            for entry in manifest["files"]:
                if (item := there.get(entry["path"])) is None:
                    raise ForgeError(f"store: {where}: {entry['path']} is missing; remove the artifact and run again")
                if item.size != entry["size"]:
                    raise ForgeError(
                        f"store: {where}: {entry['path']} has {item.size} bytes, and its manifest says {entry['size']};"
                        " remove the artifact and run again"
                    )
            wanted = [
                (
                    File(item.object_name or "", entry["size"], (item.etag or "").strip('"'), entry["sha256"]),
                    directory / entry["path"],
                )
                for entry in manifest["files"]
                for item in [there[entry["path"]]]
            ]
            if signature := s3.read_object(client, self.bucket, self._name(f"{key}/{SIGNATURE}")):
                (directory / SIGNATURE).write_bytes(signature)
            try:
                with shown(f"fetch {key}", sum(file.size for file, _ in wanted)) as tell:
                    download(client, self.bucket, wanted, tell)
            except s3.Damaged as error:
                name = str(error).removeprefix(f"{folder}/")
                raise ForgeError(
                    f"store: {where}: {name} is damaged, in the store or on the way here; run again, and if it stays "
                    "so, remove the artifact"
                ) from None
        (directory / MANIFEST).write_bytes(data)

    def _send(self, client: "Minio", staged: Path, key: str, folder: str, entries: list[dict[str, Any]]) -> None:
        listed = client.list_objects(self.bucket, prefix=f"{folder}/", recursive=True)
        there = {item.object_name: (item.size, (item.etag or "").strip('"')) for item in listed}
        wanted = []
        for entry in entries:
            path, name = staged / entry["path"], f"{folder}/{entry['path']}"
            size, etag = there.get(name, (None, ""))
            if not (size == entry["size"] and is_etag_of(path, etag)):
                wanted.append((path, File(name, entry["size"], sha256=entry["sha256"])))
        with shown(f"send {key}", sum(file.size for _, file in wanted)) as tell:
            upload(client, self.bucket, wanted, tell)

    def _folder(self, key: str, manifest: dict[str, Any]) -> str:
        """Where an artifact's files are: beside its manifest, where its name is the digest of what it holds.

        Otherwise two of one name may differ, of which one is there when its manifest is; neither touches the other's.
        """
        content = str(manifest["digest"])
        return self._name(key if key.endswith(f"/sha256-{content}") else f"{key}/{content[:16]}")

    def _key(self, uri: str) -> str:
        if not uri.startswith(f"{self.root}/"):
            raise ForgeError(f"store: {uri} is not in {self.root}; set FORGE_STORE to the store that it was made in")
        return uri.removeprefix(f"{self.root}/")

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}".lstrip("/")

    def _connect(self) -> contextlib.AbstractContextManager["Minio"]:
        return s3.connect(f"store {self.root}", self.settings, s3.SENDING)
