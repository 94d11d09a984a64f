"""A bucket of a test's own, and the machines that use it."""

import hashlib
import io
import random
import shutil
from pathlib import Path

from minio import Minio

from forge.core.settings import Settings
from forge.storage import BucketStore, s3_requests
from tests.storage.servers import client_of, settings_of


class Place:
    """A bucket with a store in it. Each machine has a home of its own, and may reach the server through a proxy."""

    def __init__(self, server: str, bucket: str, tmp_path: Path) -> None:
        self.client: Minio = client_of(server)
        self.client.make_bucket(bucket)
        self.server, self.bucket, self.tmp_path = server, bucket, tmp_path
        self.root = f"s3://{bucket}/a/prefix"

    def settings(self, machine: str, url: str = "", **more: object) -> Settings:
        """Settings of a machine that reaches the server by this URL."""
        return settings_of(url or self.server, home=self.tmp_path / machine, store=self.root, **more)

    def store(self, machine: str = "here", url: str = "", **more: object) -> BucketStore:
        """The store, as a machine opens it."""
        settings = self.settings(machine, url, **more)
        return BucketStore(settings.store, settings)

    def publish(self, files: dict[str, bytes], machine: str = "here", url: str = "") -> str:
        """Publish a package from a machine; returns its URI."""
        return publish(self.store(machine, url), files)

    def digests(self, uri: str, machine: str, url: str = "") -> dict[str, str]:
        """SHA-256 of each file of a package, as a machine reads it."""
        return digests(contents(self.store(machine, url).path(uri)))

    def forget(self, machine: str) -> None:
        """Delete a machine's home, with its local copies."""
        shutil.rmtree(self.tmp_path / machine)

    def put(self, name: str, data: bytes) -> None:
        """Write an object."""
        self.client.put_object(self.bucket, name, io.BytesIO(data), len(data))

    def names(self) -> set[str]:
        """The names of all objects."""
        return {item.object_name or "" for item in self.client.list_objects(self.bucket, recursive=True)}

    def uploads(self) -> list[str]:
        """The names of the objects with an unfinished multipart upload."""
        return [upload.object_name for upload in s3_requests.unfinished_uploads(self.client, self.bucket, "")]


def publish(store: BucketStore, files: dict[str, bytes], prefix: str = "models/dates", digest: str = "") -> str:
    """Publish files; returns the URI."""
    with store.stage() as staged:
        for name, data in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(data)
        return store.publish(staged, prefix, digest, {"kind": "model"})


def contents(directory: Path) -> dict[str, bytes]:
    """The files of an artifact without its manifest."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def package(seed: int, size: int = 200_000) -> dict[str, bytes]:
    """Files of a package, which differ between seeds. The weights have `size` bytes."""
    chance = random.Random(seed)
    return {
        "config.json": chance.randbytes(700),
        "generation_config.json": b"{}",
        "model.safetensors": chance.randbytes(size),
        "sub/empty": b"",
        "sub/ü ~.txt": chance.randbytes(7),
        "tokenizer.json": chance.randbytes(50_000),
        "tokenizer_config.json": chance.randbytes(3_000),
    }


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
