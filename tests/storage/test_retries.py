"""The store in a bucket behind a proxy that harms one request: what failed is repeated, and nothing else."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from minio.error import S3Error

from forge.core.errors import ForgeError
from forge.storage import s3, s3_errors, s3_requests, transfer
from tests.storage.faults import Choice, Request, fault_proxy
from tests.storage.place import Place, digests, package
from tests.storage.test_faults import is_manifest


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART", 5 << 20)


def once(fault: str, method: str, part: str = "") -> Choice:
    """Harm the first request of a method whose path contains this part."""
    harmed: list[Request] = []

    def choose(request: Request) -> str:
        if harmed or request.method != method or part not in request.path:
            return ""
        harmed.append(request)
        return fault

    return choose


@pytest.mark.parametrize("fault", ["cut", "refused", "busy"])
def test_a_small_object_is_read_again(place: Place, fault: str) -> None:
    uri = place.publish(package(1))
    with fault_proxy(place.server, once(fault, "GET", "manifest.json")) as proxy:
        assert place.digests(uri, "there", proxy.url) == digests(package(1))
    assert proxy.faults == [fault]


def test_a_missing_object_is_asked_for_once(place: Place) -> None:
    with fault_proxy(place.server, lambda request: "") as proxy:
        assert place.store("here", proxy.url).read("missing") is None
    assert [request.method for request in proxy.requests] == ["GET"]


@pytest.mark.parametrize("fault", ["lost", "late"])
def test_put_if_absent_survives_a_lost_answer(place: Place, fault: str) -> None:
    """A second writer is still refused."""
    with fault_proxy(place.server, once(fault, "PUT")) as proxy:
        assert place.store("here", proxy.url).put_if_absent("promotions/1", b"mine")
        assert not place.store("here", proxy.url).put_if_absent("promotions/1", b"another's")
    assert proxy.faults == [fault]
    assert place.store().read("promotions/1") == b"mine"


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # rclone ignores conditions
@pytest.mark.parametrize("fault", ["lost", "late"])
def test_put_if_unchanged_survives_a_lost_answer(place: Place, fault: str) -> None:
    """A late request of an earlier version changes nothing."""
    store = place.store()
    assert store.put_if_unchanged("leases/x.json", b"first", "")
    _, version = store.read_version("leases/x.json") or (b"", "")
    with fault_proxy(place.server, once(fault, "PUT")) as proxy:
        assert place.store("here", proxy.url).put_if_unchanged("leases/x.json", b"second", version)
        assert not place.store("here", proxy.url).put_if_unchanged("leases/x.json", b"third", version)
    assert proxy.faults == [fault]
    assert store.read("leases/x.json") == b"second"


@pytest.mark.parametrize("fault", ["busy", "lost"])
def test_only_the_completion_of_an_upload_is_repeated(place: Place, fault: str) -> None:
    files = package(1, 12 << 20)
    with fault_proxy(place.server, once(fault, "POST", "uploadId=")) as proxy:
        uri = place.publish(files, "here", proxy.url)
    assert proxy.faults == [fault]
    assert len([request for request in proxy.requests if "partNumber=" in request.path]) == 3
    assert place.digests(uri, "there") == digests(files)
    assert place.uploads() == []


def test_only_the_interrupted_part_of_an_upload_is_repeated(place: Place) -> None:
    assert_part_is_repeated(place, "broken")


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # rclone fails the upload if it is just writing that part
def test_only_the_damaged_part_of_an_upload_is_repeated(place: Place) -> None:
    assert_part_is_repeated(place, "tainted")


def assert_part_is_repeated(place: Place, fault: str) -> None:
    """Publish a file of three parts with a fault in the second one."""
    files = package(1, 12 << 20)
    with fault_proxy(place.server, once(fault, "PUT", "partNumber=2")) as proxy:
        uri = place.publish(files, "here", proxy.url)
    assert proxy.faults == [fault]
    parts = [request.path.split("partNumber=")[1][0] for request in proxy.requests if "partNumber=" in request.path]
    assert sorted(parts) == ["1", "2", "2", "3"]
    assert place.digests(uri, "there") == digests(files)


def test_a_large_file_that_has_arrived_is_not_sent_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "RETRIES", 1)
    files = package(1, 12 << 20)
    with (
        fault_proxy(place.server, lambda request: "busy" if is_manifest(request) else "") as proxy,
        pytest.raises(ForgeError, match="cannot be read"),
    ):
        place.publish(files, "here", proxy.url)
    with fault_proxy(place.server, lambda request: "") as proxy:
        uri = place.publish(files, "here", proxy.url)
    assert [is_manifest(request) for request in proxy.requests if request.method == "PUT"] == [True]
    assert place.digests(uri, "there") == digests(files)


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # rclone lists no uploads
def test_a_sweep_continues_after_a_lost_answer(place: Place) -> None:
    for name in ("a", "b"):
        s3_requests.create_upload(place.client, place.bucket, f"a/prefix/models/{name}", {})
    with fault_proxy(place.server, once("lost", "DELETE")) as proxy:
        place.store("here", proxy.url).sweep("models", timedelta(0))
    assert proxy.faults == ["lost"]
    assert place.uploads() == []


@pytest.mark.parametrize("code", ["BadDigest", "XAmzContentSHA256Mismatch"])
def test_data_that_the_server_found_damaged_is_sent_again(code: str) -> None:
    refused = SimpleNamespace(status=400)
    assert s3_errors.is_transient(S3Error(refused, code, "", "", "", ""))  # type: ignore[arg-type]
    assert not s3_errors.is_transient(S3Error(refused, "InvalidArgument", "", "", "", ""))  # type: ignore[arg-type]
