"""The store in a bucket behind a proxy that injects faults: each operation succeeds or raises a clear error.

Nothing here depends on how fast the machine is: faults are ordered by requests, not by time.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import pytest

from forge.core.errors import ForgeError
from forge.storage import s3, s3_errors, transfer
from tests.storage.faults import FAULTS, SILENT, Request, at_random, fault_proxy
from tests.storage.place import Place, digests, package

TRIES = 20
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART", 5 << 20)


def insist(place: Place, action: Callable[[], T]) -> T:
    """The result of an action that is repeated until it succeeds. Each error must be clear."""
    for _ in range(TRIES):
        try:
            return action()
        except ForgeError as error:
            assert place.root in error.message
            assert error.fix, "the error says what to do"
            assert "\n" not in error.message, "no traceback"
            last = error.message
    pytest.fail(f"{TRIES} errors, the last of them: {last}")


def is_manifest(request: Request) -> bool:
    return request.method == "PUT" and request.path.endswith("/manifest.json")


def sends_weights(request: Request) -> bool:
    return request.method == "PUT" and request.path.endswith("/model.safetensors")


@pytest.mark.parametrize(
    ("rounds", "rate"), [pytest.param(5, 0.3, id="5"), pytest.param(50, 0.1, id="50", marks=pytest.mark.long)]
)
def test_random_faults_never_damage_a_package(place: Place, rounds: int, rate: float) -> None:
    """Packages are published and fetched, each by a new machine. In the end a machine without faults finds them all."""
    published = {}
    with fault_proxy(place.server, at_random(rounds, rate)) as proxy:
        for number in range(rounds):
            files = package(number, 12 << 20 if number % 5 == 0 else 200_000)
            uri = insist(place, lambda files=files: place.publish(files, "here", proxy.url))
            assert insist(place, lambda uri=uri: place.digests(uri, "there", proxy.url)) == digests(files)
            published[uri] = digests(files)
            place.forget("here")
            place.forget("there")
    assert set(proxy.faults) == set(FAULTS)
    assert len(published) == rounds
    for uri, expected in published.items():
        assert place.digests(uri, "elsewhere") == expected
        place.forget("elsewhere")
    s3.abort_stale_uploads(place.client, place.bucket, "a/prefix/models/", timedelta(0))
    assert place.uploads() == []


@pytest.mark.parametrize("fault", ["busy", "sick", "refused", "broken"])
def test_a_package_without_its_manifest_does_not_exist(
    place: Place, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A later attempt to publish it sends only the manifest."""
    monkeypatch.setattr(s3, "RETRIES", 1)
    files = package(1)
    with (
        fault_proxy(place.server, lambda request: fault if is_manifest(request) else "") as proxy,
        pytest.raises(ForgeError, match=rf"^store {place.root}: .* cannot be read .*; check FORGE_S3_ENDPOINT"),
    ):
        place.publish(files, "here", proxy.url)
    manifest = next(request.path for request in proxy.requests if is_manifest(request))
    key = manifest.removeprefix(f"/{place.bucket}/a/prefix/").removesuffix("/manifest.json")
    uri = f"{place.root}/{key}"
    for machine in ("here", "there"):
        assert not place.store(machine).exists(key)
        for read in (place.store(machine).path, place.store(machine).manifest):
            with pytest.raises(ForgeError, match=f"{key} is gone"):
                read(uri)
    with fault_proxy(place.server, lambda request: "") as proxy:
        assert place.publish(files, "here", proxy.url) == uri
    assert [request.path for request in proxy.requests if request.method == "PUT"] == [manifest]
    assert place.digests(uri, "there") == digests(files)


@pytest.mark.parametrize("fault", ["cut", "flipped"])
def test_a_file_that_always_arrives_damaged_is_an_error(place: Place, fault: str) -> None:
    uri = place.publish(package(1), "here")

    def choose(request: Request) -> str:
        return fault if request.method == "GET" and request.path.endswith("/model.safetensors") else ""

    with fault_proxy(place.server, choose) as proxy:
        there = place.store("there", proxy.url)
        with pytest.raises(ForgeError, match=rf"{place.root}.*(is damaged|cannot be read .*IncompleteRead)"):
            there.path(uri)
    assert len(proxy.faults) == s3_errors.ATTEMPTS
    assert not (there.copies.root / uri.removeprefix(f"{place.root}/")).exists()
    assert place.digests(uri, "there") == digests(package(1))


def test_a_file_that_is_always_damaged_on_its_way_is_not_published(place: Place) -> None:
    with (
        fault_proxy(place.server, lambda request: "tainted" if sends_weights(request) else "") as proxy,
        pytest.raises(ForgeError, match=f"^store {place.root}: .*(arrived damaged several times|BadDigest)"),
    ):
        place.publish(package(1), "here", proxy.url)
    assert len(proxy.faults) == s3_errors.ATTEMPTS
    assert not any(found.whole for found in place.store("there").artifacts("models"))


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # the client's own behaviour
def test_a_server_that_does_not_answer_is_asked_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = place.publish(package(1), "here")
    monkeypatch.setattr(s3, "READ", 1)
    silent = iter([SILENT])

    def choose(request: Request) -> str:
        return next(silent, "") if request.method == "GET" else ""

    with fault_proxy(place.server, choose) as proxy:
        assert insist(place, lambda: place.digests(uri, "there", proxy.url)) == digests(package(1))
    assert proxy.faults == [SILENT]
    monkeypatch.setattr(s3, "READ", 0.2)
    monkeypatch.setattr(s3, "RETRIES", 1)
    with (
        fault_proxy(place.server, lambda request: SILENT) as proxy,
        pytest.raises(ForgeError, match=r"cannot be read .*[Tt]imed out.*check FORGE_S3_ENDPOINT and the network"),
    ):
        place.store("there", proxy.url).read("identity")


def test_after_a_failure_no_upload_continues(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "RETRIES", 0)

    def choose(request: Request) -> str:
        return "refused" if request.method == "PUT" and request.path.endswith("/config.json") else ""

    before = set(threading.enumerate())
    with fault_proxy(place.server, choose) as proxy:
        with pytest.raises(ForgeError, match="cannot be read"):
            place.publish(package(1, 40 << 20), "here", proxy.url)
        threads = [thread.name for thread in set(threading.enumerate()) - before]
    assert [name for name in threads if name.startswith("ThreadPoolExecutor")] == []


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # rclone lists no uploads
def test_interrupted_uploads_are_swept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client never learns the ID of one of them, and can neither complete nor abort the others."""
    monkeypatch.setattr(s3, "RETRIES", 1)
    begun: list[str] = []

    def choose(request: Request) -> str:
        if request.method == "POST" and "uploads=" in request.path:
            begun.append(request.path)
            return "lost" if len(begun) == 1 else ""
        return "busy" if request.method in ("POST", "DELETE") else ""

    files = package(1, 12 << 20)
    with fault_proxy(place.server, choose) as proxy, pytest.raises(ForgeError, match=r"SlowDown|503"):
        place.publish(files, "here", proxy.url)
    assert len(place.uploads()) == len(begun) > 1
    assert s3.abort_stale_uploads(place.client, place.bucket, "a/prefix/", timedelta(0)) == len(begun)
    assert place.uploads() == []
    assert place.digests(place.publish(files, "here"), "there") == digests(files)
