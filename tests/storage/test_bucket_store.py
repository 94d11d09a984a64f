"""The store in a bucket, on real S3 servers: what is there is whole, and what is read is what was written."""

import contextlib
import io
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from minio import Minio

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.storage import BucketStore, transfer
from tests.storage.servers import MAKES, client_of, rclone, server_of, settings_of


@pytest.fixture(scope="module", params=MAKES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server."""
    with server_of(request.param, tmp_path_factory.mktemp("server")) as url:
        yield url


class Place:
    """A bucket of a test's own, and a machine's settings for a store in it."""

    def __init__(self, server: str, name: str, tmp_path: Path) -> None:
        self.client: Minio = client_of(server)
        self.client.make_bucket(name)
        self.bucket, self.server, self.tmp_path = name, server, tmp_path

    def settings(self, machine: str, **more: object) -> Settings:
        return settings_of(self.server, home=self.tmp_path / machine, store=f"s3://{self.bucket}/a/prefix", **more)

    def store(self, machine: str = "here", **more: object) -> BucketStore:
        settings = self.settings(machine, **more)
        return BucketStore(settings.store, settings)

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(self.bucket, name, io.BytesIO(data), len(data))

    def names(self) -> set[str]:
        return {item.object_name for item in self.client.list_objects(self.bucket, recursive=True)}


@pytest.fixture
def place(server: str, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    number = abs(hash(request.node.name)) % 10**9
    return Place(server, f"bucket-{number}-{os.getpid()}", tmp_path)


FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 4096,
    "sub/empty": b"",
    "sub/ü ~.txt": b"\0" * 7,
}


def publish(store: BucketStore, prefix: str = "models/dates", digest: str = "", files: dict[str, bytes] = FILES) -> str:
    with store.stage() as staged:
        for name, data in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(data)
        return store.publish(staged, prefix, digest, {"kind": "model"})


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_what_is_published_here_is_read_elsewhere(place: Place) -> None:
    uri = publish(place.store())
    assert contents(place.store().path(uri)) == FILES
    there = place.store("elsewhere")
    assert contents(there.path(uri)) == FILES
    assert there.path(f"{uri}/sub/empty").read_bytes() == b""
    assert there.manifest(uri)["kind"] == "model"
    assert there.exists(uri.removeprefix(f"{there.root}/"))
    assert there.identity == place.store().identity


def test_files_of_many_parts_arrive(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART", 5 << 20)
    big = {"model.safetensors": os.urandom(1 << 20) * 17}
    assert contents(place.store("elsewhere").path(publish(place.store(), files=big))) == big


def test_nothing_is_sent_twice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an attempt sent that was broken off is there already; of a published artifact nothing is sent."""
    sent: list[str] = []
    broken = ["model.safetensors"]
    send = transfer._Sending.send

    def watched(self: transfer._Sending, path: Path, file: transfer.File) -> None:
        if path.name in broken:
            raise KeyboardInterrupt
        send(self, path, file)
        sent.append(path.name)

    monkeypatch.setattr(transfer._Sending, "send", watched)
    with pytest.raises(KeyboardInterrupt):
        publish(place.store())
    assert not any(name.endswith("manifest.json") for name in place.names())
    broken.clear()
    uri = publish(place.store())
    assert sorted(sent) == ["config.json", "empty", "model.safetensors", "ü ~.txt"]
    publish(place.store())
    assert len(sent) == 4, "nothing that was there"
    assert contents(place.store("elsewhere").path(uri)) == FILES


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("flip", "model.safetensors is damaged"),
        ("cut", "model.safetensors has 5 bytes, and its manifest says"),
        ("take", "model.safetensors is missing"),
        ("add", "extra.json is not in the manifest"),
        ("manifest", "manifest.json is broken"),
        ("outside", "manifest.json is broken"),
        ("none", "is gone, or was never whole|is gone"),
    ],
)
def test_what_is_not_as_published_is_refused_by_name(place: Place, change: str, says: str) -> None:
    uri = publish(place.store())
    folder = uri.removeprefix(f"s3://{place.bucket}/")
    model, manifest = f"{folder}/model.safetensors", f"{folder}/manifest.json"
    data = bytearray(FILES["model.safetensors"])
    data[12345] ^= 1
    if change in ("take", "none"):
        place.client.remove_object(place.bucket, model if change == "take" else manifest)
    elif change == "add":
        place.put(f"{folder}/extra.json", b"{}")
    elif change in ("flip", "cut"):
        place.put(model, bytes(data) if change == "flip" else b"short")
    else:
        text = place.client.get_object(place.bucket, manifest).read()
        place.put(manifest, text[:-9] if change == "manifest" else text.replace(b"config.json", b"../config.json"))
    there = place.store("elsewhere")
    with pytest.raises(ForgeError, match=says):
        there.path(uri)
    assert [
        path for path in there.copies.root.rglob("*") if path.is_file() and not path.parent.name.startswith(".")
    ] == []


def test_two_that_differ_under_one_name_do_not_mix(place: Place) -> None:
    """Answers say how long they took: a second machine's differ, and the first to be whole stays."""
    first = {"answers": b"first", "more": b"1"}
    uri = publish(place.store("one"), "answers", "d" * 64, first)
    assert publish(place.store("two"), "answers", "d" * 64, {"answers": b"second", "more": b"2"}) == uri
    for machine in ("one", "two", "three"):
        assert contents(place.store(machine).path(uri)) == first


def test_what_is_removed_is_gone(place: Place) -> None:
    store = place.store()
    uri = publish(store)
    store.remove(uri)
    assert place.names() == set()
    with pytest.raises(ForgeError, match="is gone"):
        store.path(uri)
    store.remove(uri)


def test_small_objects_are_written_once(place: Place) -> None:
    store = place.store()
    assert store.read("leases/dates") is None
    assert store.put_if_absent("leases/dates", b"one")
    assert not store.put_if_absent("leases/dates", b"two")
    assert store.read("leases/dates") == b"one"


def test_an_uri_of_another_store_is_named(place: Place) -> None:
    with pytest.raises(ForgeError, match=r"file:///tmp/x is not in s3://.*FORGE_STORE"):
        place.store().path("file:///tmp/x")


def test_copies_are_within_their_limit_and_those_in_use_stay(place: Place) -> None:
    uris = [publish(place.store("elsewhere"), files={"data": bytes([number]) * 100_000}) for number in range(4)]
    store = place.store(copies_gb=0.00025)  # two of them

    def kept() -> list[bool]:
        return [(store.copies.root / uri.removeprefix(f"{store.root}/")).is_dir() for uri in uris]

    for uri in uris[:3]:
        store.path(uri)
    assert kept() == [True, True, True, False], "all are in use"
    later = place.store(copies_gb=0.00025)
    for handle in store.copies._held.values():
        os.close(handle)  # as the end of its process does
    later.path(uris[0])
    later.path(uris[3])
    assert kept() == [True, False, False, True]


def fetch(settings: Settings, uri: str) -> dict[str, bytes]:
    return contents(BucketStore(settings.store, settings).path(uri))


def test_processes_share_a_copy(place: Place) -> None:
    uri = publish(place.store("elsewhere"))
    with contextlib.closing(multiprocessing.get_context("spawn").Pool(4)) as pool:
        found = pool.starmap(fetch, [(place.settings("here"), uri)] * 8)
    assert found == [FILES] * 8


def test_a_bucket_that_is_not_there_is_named(server: str, tmp_path: Path) -> None:
    settings = settings_of(server, home=tmp_path, store="s3://nowhere-at-all/x")
    with pytest.raises(ForgeError, match=r"store s3://nowhere-at-all/x: .*NoSuchBucket.*check the bucket's name"):
        _ = BucketStore(settings.store, settings).identity


def test_who_only_reads_needs_no_right_to_write(tmp_path: Path) -> None:
    """As the user of what serves, which may list and get."""
    (tmp_path / "server" / "bucket").mkdir(parents=True)
    given = {"store": "s3://bucket/forge", "copies_gb": 1}
    with rclone(tmp_path / "server") as url:
        settings = settings_of(url, home=tmp_path / "writer", **given)
        writer = BucketStore(settings.store, settings)
        uri = publish(writer)
        writer.put("serving/desired.json", b"{}")
    with rclone(tmp_path / "server", read_only=True) as url:
        settings = settings_of(url, home=tmp_path / "reader", **given)
        reader = BucketStore(settings.store, settings)
        assert contents(reader.path(uri)) == FILES
        assert reader.manifest(uri)["kind"] == "model"
        assert (reader.part(uri, "config.json"), reader.read("serving/desired.json")) == (b"{}", b"{}")
        assert reader.names("serving") == ["desired.json"]
        assert reader.exists(uri.removeprefix(f"{reader.root}/"))
        assert [found.uri for found in reader.artifacts("models")] == [uri]
        with pytest.raises(ForgeError, match=r"store s3://bucket/forge: .*cannot be read"):
            _ = reader.identity
