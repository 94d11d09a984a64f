"""The store in a bucket, on real S3 servers: artifacts are complete, and are read as they were written."""

import contextlib
import multiprocessing
import os
from pathlib import Path

import pytest

from forge.core.errors import ForgeError
from forge.storage import BucketStore, s3, transfer
from tests.storage.other_process import fetch
from tests.storage.place import Place, contents, digests, publish
from tests.storage.servers import rclone, settings_of

FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 4096,
    "sub/empty": b"",
    "sub/ü ~.txt": b"\0" * 7,
}


def test_a_published_artifact_can_be_read_from_another_machine(place: Place) -> None:
    uri = place.publish(FILES)
    assert contents(place.store().path(uri)) == FILES
    elsewhere = place.store("elsewhere")
    assert contents(elsewhere.path(uri)) == FILES
    assert elsewhere.path(f"{uri}/sub/empty").read_bytes() == b""
    assert elsewhere.manifest(uri)["kind"] == "model"
    assert elsewhere.exists(uri.removeprefix(f"{elsewhere.root}/"))
    assert elsewhere.identity == place.store().identity


def test_multipart_uploads_arrive(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART", 5 << 20)
    big = {"model.safetensors": os.urandom(1 << 20) * 17}
    assert contents(place.store("elsewhere").path(place.publish(big))) == big


def test_no_file_is_sent_twice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second attempt sends only what an interrupted one did not, and nothing of a published artifact."""
    sent: list[str] = []
    broken = ["model.safetensors"]
    send = transfer._Uploader.send

    def watched(self: transfer._Uploader, path: Path, file: transfer.File) -> None:
        if path.name in broken:
            raise KeyboardInterrupt
        send(self, path, file)
        sent.append(path.name)

    monkeypatch.setattr(transfer._Uploader, "send", watched)
    with pytest.raises(KeyboardInterrupt):
        place.publish(FILES)
    assert not any(name.endswith("manifest.json") for name in place.names())
    broken.clear()
    uri = place.publish(FILES)
    assert sorted(sent) == ["config.json", "empty", "model.safetensors", "ü ~.txt"]
    place.publish(FILES)
    assert len(sent) == 4, "no file that was there already"
    assert contents(place.store("elsewhere").path(uri)) == FILES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("flip", "model.safetensors is damaged"),
        ("cut", "model.safetensors has 5 bytes, and its manifest says"),
        ("take", "model.safetensors is missing"),
        ("add", "extra.json is not in the manifest"),
        ("manifest", "manifest.json is broken"),
        ("outside", "manifest.json is broken"),
        ("none", "is gone"),
    ],
)
def test_a_changed_artifact_is_rejected_by_file_name(place: Place, change: str, message: str) -> None:
    uri = place.publish(FILES)
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
    elsewhere = place.store("elsewhere")
    with pytest.raises(ForgeError, match=message):
        elsewhere.path(uri)
    assert [
        path for path in elsewhere.copies.root.rglob("*") if path.is_file() and not path.parent.name.startswith(".")
    ] == []


def test_two_artifacts_with_the_same_key_do_not_mix(place: Place) -> None:
    """Two machines may publish different files with the same key. The first complete artifact stays."""
    first = {"answers": b"first", "more": b"1"}
    uri = publish(place.store("one"), first, "answers", "d" * 64)
    assert publish(place.store("two"), {"answers": b"second", "more": b"2"}, "answers", "d" * 64) == uri
    for machine in ("one", "two", "three"):
        assert contents(place.store(machine).path(uri)) == first


def test_a_removed_artifact_is_gone(place: Place) -> None:
    store = place.store()
    uri = publish(store, FILES)
    store.remove(uri)
    assert place.names() == set()
    with pytest.raises(ForgeError, match="is gone"):
        store.path(uri)
    store.remove(uri)


def test_put_if_absent_writes_once(place: Place) -> None:
    store = place.store()
    assert store.read("some/key") is None
    assert store.put_if_absent("some/key", b"one")
    assert not store.put_if_absent("some/key", b"two")
    assert store.read("some/key") == b"one"


def test_a_uri_of_another_store_is_an_error(place: Place) -> None:
    with pytest.raises(ForgeError, match=r"file:///tmp/x is not in s3://.*FORGE_STORE"):
        place.store().path("file:///tmp/x")


def test_local_copies_stay_within_their_limit_unless_in_use(place: Place) -> None:
    uris = [place.publish({"data": bytes([number]) * 100_000}, "elsewhere") for number in range(4)]
    store = place.store(copies_gb=0.00025)  # room for two

    def kept() -> list[bool]:
        return [(store.copies.root / uri.removeprefix(f"{store.root}/")).is_dir() for uri in uris]

    for uri in uris[:3]:
        store.path(uri)
    assert kept() == [True, True, True, False], "all of them are in use"
    later = place.store(copies_gb=0.00025)
    for handle in store.copies._held.values():
        os.close(handle)  # as when the process ends
    later.path(uris[0])
    later.path(uris[3])
    assert kept() == [True, False, False, True]


def test_processes_share_a_local_copy(place: Place) -> None:
    uri = place.publish(FILES, "elsewhere")
    with contextlib.closing(multiprocessing.get_context("spawn").Pool(4)) as pool:
        found = pool.starmap(fetch, [(place.settings("here"), uri)] * 8)
    assert found == [digests(FILES)] * 8


def test_a_missing_bucket_is_an_error(server: str, tmp_path: Path) -> None:
    settings = settings_of(server, home=tmp_path, store="s3://nowhere-at-all/x")
    with pytest.raises(ForgeError, match=r"store s3://nowhere-at-all/x: .*NoSuchBucket.*check the bucket's name"):
        _ = BucketStore(settings.store, settings).identity


def test_reading_needs_no_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The S3 user of the serving cluster may only list and get."""
    (tmp_path / "server" / "bucket").mkdir(parents=True)
    given = {"store": "s3://bucket/forge", "copies_gb": 1}
    with rclone(tmp_path / "server") as url:
        settings = settings_of(url, home=tmp_path / "writer", **given)
        writer = BucketStore(settings.store, settings)
        uri = publish(writer, FILES)
        writer.put("serving/desired.json", b"{}")
    monkeypatch.setattr(s3, "RETRIES", 0)  # rclone answers 500 to a write
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
