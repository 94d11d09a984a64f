"""The store in a bucket behind a proxy that does harm: what is asked ends right, or with a clear error."""

import hashlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from minio import Minio

from forge.core.errors import ForgeError
from forge.storage import BucketStore, s3, transfer
from tests.storage.faults import FAULTS, Request, at_random, harmful
from tests.storage.servers import MAKES, client_of, server_of, settings_of

READ = 0.5  # seconds: what the client waits here
LATE = 0.8
TRIES = 20
T = TypeVar("T")


@pytest.fixture(scope="module", params=MAKES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server."""
    with server_of(request.param, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "READ", READ)
    monkeypatch.setattr(transfer, "PART", 5 << 20)


class Place:
    """A bucket of a test's own, which machines use directly or by a proxy."""

    def __init__(self, server: str, bucket: str, tmp_path: Path) -> None:
        self.client: Minio = client_of(server)
        self.client.make_bucket(bucket)
        self.server, self.bucket, self.tmp_path = server, bucket, tmp_path
        self.root = f"s3://{bucket}/a/prefix"

    def store(self, machine: str, url: str = "") -> BucketStore:
        settings = settings_of(url or self.server, home=self.tmp_path / machine, store=self.root)
        return BucketStore(settings.store, settings)

    def publish(self, files: dict[str, bytes], machine: str, url: str = "") -> str:
        store = self.store(machine, url)
        with store.stage() as staged:
            for name, data in files.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).write_bytes(data)
            return store.publish(staged, "models/dates", facts={"kind": "model"})

    def digests(self, uri: str, machine: str, url: str = "") -> dict[str, str]:
        """SHA-256 by name of an artifact's files, fetched to a machine that has no copy yet."""
        directory = self.store(machine, url).path(uri)
        files = (path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
        return {path.relative_to(directory).as_posix(): sha256(path.read_bytes()) for path in files}

    def forget(self, machine: str) -> None:
        shutil.rmtree(self.tmp_path / machine)

    def insist(self, what: Callable[[], T]) -> T:
        """What is asked for, however often it ends with an error, each of which must be clear."""
        for _ in range(TRIES):
            try:
                return what()
            except ForgeError as error:
                text = error.format_message()
                assert self.root in text
                assert "; " in text, "and it says what to do"
                assert "\n" not in text, "no traceback"
        pytest.fail(f"{TRIES} errors, the last of them: {text}")

    def uploads(self) -> list[str | None]:
        return [upload.object_name for upload in self.client._list_multipart_uploads(self.bucket).uploads]


@pytest.fixture
def place(server: str, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(server, f"bucket-{sha256(request.node.name.encode())[:16]}", tmp_path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def package(number: int, size: int = 200_000) -> dict[str, bytes]:
    """Files, others for each number."""
    chance = random.Random(number)
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
    return {name: sha256(data) for name, data in files.items()}


@pytest.mark.parametrize(
    ("rounds", "rate"), [pytest.param(5, 0.3, id="5"), pytest.param(50, 0.1, id="50", marks=pytest.mark.long)]
)
def test_pushes_and_fetches_end_right_or_with_a_clear_error(place: Place, rounds: int, rate: float) -> None:
    """Each machine that fetches is a new one. In the end all of it is there, as who meets no faults finds."""
    published = {}
    with harmful(place.server, at_random(rounds, rate), LATE) as proxy:
        for number in range(rounds):
            files = package(number, 12 << 20 if number % 5 == 0 else 200_000)
            uri = place.insist(lambda files=files: place.publish(files, "here", proxy.url))
            assert place.insist(lambda uri=uri: place.digests(uri, "there", proxy.url)) == digests(files)
            published[uri] = digests(files)
            place.forget("here")
            place.forget("there")
    assert set(proxy.met) == set(FAULTS)
    assert len(published) == rounds
    for uri, expected in published.items():
        assert place.digests(uri, "elsewhere") == expected
        place.forget("elsewhere")
    s3.abort_stale_uploads(place.client, place.bucket, "a/prefix/models/", timedelta(0))
    assert place.uploads() == []


@pytest.mark.parametrize("fault", ["busy", "sick", "refused", "broken"])
def test_without_its_manifest_a_package_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """And a later push sends the manifest alone."""
    monkeypatch.setattr(s3, "RETRIES", 1)
    files = package(1)

    def is_manifest(request: Request) -> bool:
        return request.method == "PUT" and request.path.endswith("/manifest.json")

    with (
        harmful(place.server, lambda request: fault if is_manifest(request) else "") as proxy,
        pytest.raises(ForgeError, match=rf"^store {place.root}: .* cannot be read .*; check FORGE_S3_ENDPOINT"),
    ):
        place.publish(files, "here", proxy.url)
    manifest = next(request.path for request in proxy.asked if is_manifest(request))
    key = manifest.removeprefix(f"/{place.bucket}/a/prefix/").removesuffix("/manifest.json")
    uri = f"{place.root}/{key}"
    for machine in ("here", "there"):
        assert not place.store(machine).exists(key)
        for asked in (place.store(machine).path, place.store(machine).manifest):
            with pytest.raises(ForgeError, match=f"{key} is gone"):
                asked(uri)
    with harmful(place.server, lambda request: "") as proxy:
        assert place.publish(files, "here", proxy.url) == uri
    assert [request.path for request in proxy.asked if request.method == "PUT"] == [manifest]
    assert place.digests(uri, "there") == digests(files)


@pytest.mark.parametrize("fault", ["cut", "flipped"])
def test_what_always_arrives_harmed_is_never_taken_for_whole(place: Place, fault: str) -> None:
    uri = place.publish(package(1), "here")

    def choose(request: Request) -> str:
        return fault if request.method == "GET" and request.path.endswith("/model.safetensors") else ""

    with harmful(place.server, choose) as proxy:
        there = place.store("there", proxy.url)
        with pytest.raises(ForgeError, match=rf"{place.root}.*(is damaged|cannot be read .*IncompleteRead)"):
            there.path(uri)
    assert len(proxy.met) == transfer.ATTEMPTS
    assert not (there.copies.root / uri.removeprefix(f"{place.root}/")).exists()
    assert place.digests(uri, "there") == digests(package(1))


def test_what_is_always_sent_harmed_is_never_published(place: Place) -> None:
    def choose(request: Request) -> str:
        return "tainted" if request.method == "PUT" and request.path.endswith("/model.safetensors") else ""

    with (
        harmful(place.server, choose) as proxy,
        pytest.raises(ForgeError, match=f"^store {place.root}: .*(arrived damaged again and again|BadDigest)"),
    ):
        place.publish(package(1), "here", proxy.url)
    assert len(proxy.met) == transfer.ATTEMPTS
    assert not any(found.whole for found in place.store("there").artifacts("models"))


def test_after_a_failure_nothing_is_being_sent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "RETRIES", 0)

    def choose(request: Request) -> str:
        return "refused" if request.method == "PUT" and request.path.endswith("/config.json") else ""

    before = set(threading.enumerate())
    with harmful(place.server, choose) as proxy:
        with pytest.raises(ForgeError, match="cannot be read"):
            place.publish(package(1, 40 << 20), "here", proxy.url)
        threads = [thread.name for thread in set(threading.enumerate()) - before]
    assert [name for name in threads if name.startswith("ThreadPoolExecutor")] == []


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # rclone tells of no uploads
def test_uploads_that_were_broken_off_are_swept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some the client never hears of, and others it can neither complete nor abort."""
    monkeypatch.setattr(s3, "RETRIES", 1)
    begun: list[str] = []

    def choose(request: Request) -> str:
        if request.method == "POST" and "uploads=" in request.path:
            begun.append(request.path)
            return "lost" if len(begun) == 1 else ""
        return "busy" if request.method in ("POST", "DELETE") else ""

    files = package(1, 12 << 20)
    with harmful(place.server, choose) as proxy, pytest.raises(ForgeError, match=r"SlowDown|503"):
        place.publish(files, "here", proxy.url)
    assert len(place.uploads()) == len(begun) > 1
    assert s3.abort_stale_uploads(place.client, place.bucket, "a/prefix/", timedelta(0)) == len(begun)
    assert place.uploads() == []
    assert place.digests(place.publish(files, "here"), "there") == digests(files)
