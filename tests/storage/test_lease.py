"""Leases: one holder at a time, by conditional writes or, if the store lacks them, by the bakery algorithm."""

import contextlib
import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from minio.error import S3Error

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.storage import BucketStore, Store, open_store, s3, s3_requests
from forge.storage import lease as lease_module
from forge.storage.lease import current_owner, lease
from forge.storage.lease_bakery import BakeryClaim
from forge.storage.lease_conditional import ConditionalClaim
from forge.storage.lease_watch import LeaseWatch
from tests.storage.faults import Request, fault_proxy
from tests.storage.other_process import count_up, hold
from tests.storage.place import Place
from tests.storage.servers import MAKES, client_of, settings_of, shared_server

SPAWN = multiprocessing.get_context("spawn")
CONDITIONAL = {"directory": True, "moto": True, "rclone": False}


@pytest.fixture(params=["directory", *MAKES])
def settings(request: pytest.FixtureRequest, tmp_path: Path, bucket_name: str) -> Settings:
    """Settings of a store of each kind."""
    if request.param == "directory":
        return Settings(home=tmp_path)
    client_of(shared_server(request.param)).make_bucket(bucket_name)
    return settings_of(shared_server(request.param), home=tmp_path, store=f"s3://{bucket_name}/forge")


@pytest.fixture
def any_store(settings: Settings) -> Store:
    """A store of each kind."""
    return open_store(settings)


def write_claim(store: Store, owner: str) -> str:
    """Write the claim of another process that has acquired the lease dates; returns its key."""
    if store.conditional_writes:
        key, claim = "leases/dates.json", {"owner": owner, "token": "another"}
    else:
        key, claim = "leases/dates/another", {"owner": owner, "number": 1}
    store.put(key, json.dumps(claim).encode())
    return key


# --- one holder


def test_the_algorithm_depends_on_the_store(any_store: Store, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["settings"]
    if kind in CONDITIONAL:
        assert any_store.conditional_writes is CONDITIONAL[kind]
    with lease(any_store, "dates"):
        assert (any_store.read("leases/dates.json") is not None) == any_store.conditional_writes
        assert len(any_store.names("leases/dates")) == (0 if any_store.conditional_writes else 1)
    assert any_store.names("leases/dates") == []


def test_of_many_processes_one_holds_the_lease(settings: Settings, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    with SPAWN.Pool(4) as pool:
        assert pool.starmap(count_up, [(settings, counter, 5)] * 4) == [True] * 4
    assert counter.read_text() == "20"


@pytest.mark.parametrize("kind", ["directory", "moto"])
def test_the_bakery_needs_no_conditional_writes(
    kind: str, tmp_path: Path, bucket_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every kind of store, among threads that contend."""
    store: Store = open_store(Settings(home=tmp_path))
    if kind == "moto":
        store = Place(shared_server(kind), bucket_name, tmp_path).store()
    for name in ("read_version", "put_if_unchanged", "put_if_absent"):
        monkeypatch.setattr(type(store), name, None)
    monkeypatch.setattr(type(store), "conditional_writes", False)
    monkeypatch.setattr(lease_module, "POLL", 0.02)
    holders: list[int] = []

    def work(number: int) -> None:
        for _ in range(3):
            with lease(store, "dates") as check:
                holders.append(number)
                time.sleep(0.005)
                assert holders[-1] == number, "another thread has it, too"
                check()

    run_threads(work, 4)
    assert sorted(holders) == sorted([0, 1, 2, 3] * 3)
    assert store.names("leases/dates") == []


def run_threads(work: object, count: int) -> None:
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)  # type: ignore[operator]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


# --- abandoned leases


def test_the_lease_of_a_killed_process_is_taken_over(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquired = tmp_path / "acquired"
    process = SPAWN.Process(target=hold, args=[settings, acquired])
    process.start()
    while not acquired.exists():
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    monkeypatch.setattr(lease_module, "ABANDONED", 0.6)
    store = open_store(settings)
    with lease(store, "dates") as check:
        check()
    assert store.names("leases/dates") == []


@pytest.mark.parametrize("data", [b"{", b'{"owner": "x", "number": null}', b'{"owner": "x", "token": 7}'])
def test_an_unreadable_claim_is_taken_over(any_store: Store, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "ABANDONED", 0.4)
    any_store.put(write_claim(any_store, "x"), data)
    with lease(any_store, "dates") as check:
        check()


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = (record.getMessage() for record in caplog.records if record.name == lease_module.__name__)
    return [message.split(",")[0] for message in messages]


def test_an_earlier_attempt_of_the_same_execution_is_not_waited_for(
    any_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, lease_module.__name__)
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123")
    write_claim(any_store, current_owner())
    with lease(any_store, "dates"):
        assert waits(caplog) == []
    monkeypatch.setattr(lease_module, "ABANDONED", 0.5)
    write_claim(any_store, "another execution")
    with lease(any_store, "dates"):
        assert waits(caplog) == ["waiting for another execution"]


class Clock:
    """A monotonic clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("forge.storage.lease_watch.time", self)

    def monotonic(self) -> float:
        return self.now


def claim_of(store: Store, owner: str) -> lease_module.Claim:
    kind = ConditionalClaim if store.conditional_writes else BakeryClaim
    return kind(store, "leases/dates", owner, LeaseWatch(60, lambda owner: False))


def test_a_lease_is_taken_over_a_minute_after_the_last_renewal(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    first, second = claim_of(any_store, "first"), claim_of(any_store, "second")
    first.join()
    assert first.ahead() == ""
    second.join()
    for clock.now in (0, 59, 118, 177):
        assert second.ahead() == "first"
        first.renew()
    assert second.ahead() == "first", "renewed since the last look"
    clock.now += 59
    assert second.ahead() == "first"
    clock.now += 2
    assert second.ahead() == ""
    assert second.is_held()
    assert not first.is_held()


def test_a_lease_is_renewed_while_it_is_held(any_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEWED", 0.02)

    def content() -> bytes | None:
        names = any_store.names("leases/dates")
        return any_store.read(f"leases/dates/{names[0]}" if names else "leases/dates.json")

    with lease(any_store, "dates") as check:
        before = content()
        while content() == before:
            time.sleep(0.02)
        check()


def test_a_lost_lease_is_an_error(any_store: Store) -> None:
    with lease(any_store, "dates") as check:
        check()
        for name in any_store.names("leases/dates"):
            any_store.delete(f"leases/dates/{name}")
        if any_store.conditional_writes:
            write_claim(any_store, "another")
        with pytest.raises(ForgeError, match=r"leases/dates: the lease was lost, .* 60 s; run again"):
            check()


@pytest.mark.parametrize("settings", ["directory", "moto"], indirect=True)  # the bakery has no such guarantee
def test_a_holder_that_stalled_cannot_take_the_lease_back(any_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it release the lease of its successor."""
    clock = Clock(monkeypatch)
    first, second, third = (claim_of(any_store, owner) for owner in ("first", "second", "third"))
    assert first.ahead() == ""
    assert second.ahead() == "first"
    clock.now += 61
    assert second.ahead() == ""
    first.renew()
    first.release()
    assert second.is_held()
    assert third.ahead() == "second"
    second.release()
    assert not second.is_held()
    assert third.ahead() == ""


def test_a_claim_in_the_bakery_that_was_deleted_while_it_waited_joins_again(store: Store) -> None:
    watch = LeaseWatch(60, lambda owner: False)
    first, second = (BakeryClaim(store, "leases/dates", owner, watch) for owner in ("first", "second"))
    first.join()
    second.join()
    assert second.ahead() == "first"
    store.delete(f"leases/dates/{second.name}")
    first.release()
    third = BakeryClaim(store, "leases/dates", "third", watch)
    third.join()
    assert third.ahead() == ""
    assert second.ahead() == "third", "it has drawn a new number"
    third.release()
    assert second.ahead() == ""


# --- the probe


@contextlib.contextmanager
def recorded(place: Place) -> Iterator[tuple[BucketStore, list[Request]]]:
    with fault_proxy(place.server, lambda request: "") as proxy:
        yield place.store("here", proxy.url), proxy.requests


def test_the_store_is_probed_once_and_only_under_leases(place: Place) -> None:
    with recorded(place) as (store, requests):
        for name in ("dates", "words"):
            with lease(store, name):
                pass
    changes = [request for request in requests if request.method not in ("GET", "HEAD")]
    assert all(request.path.startswith(f"/{place.bucket}/a/prefix/leases/") for request in changes)
    probes = [request.method for request in changes if "/leases/probe-" in request.path]
    assert probes == (["PUT", "PUT", "PUT", "DELETE"] if store.conditional_writes else ["PUT", "PUT", "DELETE"])
    assert not any("probe" in name for name in place.names())


def test_a_probe_that_fails_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two processes could use different algorithms."""
    monkeypatch.setattr(s3, "RETRIES", 1)
    with fault_proxy(place.server, lambda request: "busy" if request.method == "PUT" else "") as proxy:
        store = place.store("here", proxy.url)
        with pytest.raises(ForgeError, match="cannot be read"), lease(store, "dates"):
            pass


def test_a_server_that_refuses_the_header_has_no_conditional_writes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise S3Error(SimpleNamespace(status=501), "NotImplemented", "", "", "", "")  # type: ignore[arg-type]

    monkeypatch.setattr(s3_requests, "put", refuse)
    assert not place.store().conditional_writes
    assert place.names() == set()


@pytest.mark.parametrize("fault", ["lost", "late", "refused", "busy"])
def test_a_lease_survives_faults(place: Place, fault: str) -> None:
    """Every second request that writes meets one, and is repeated by the client."""
    count = 0

    def choose(request: Request) -> str:
        nonlocal count
        count += request.method == "PUT"
        return fault if request.method == "PUT" and count % 2 else ""

    with fault_proxy(place.server, choose) as proxy:
        for _ in range(3):
            with lease(place.store("here", proxy.url), "dates") as check:
                check()
    assert fault in proxy.faults
    assert place.store().names("leases/dates") == []
