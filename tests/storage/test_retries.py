"""The store in a bucket behind a proxy that harms one request: what failed is done again, and nothing else is."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from minio.error import S3Error

from forge.core.errors import ForgeError
from forge.storage import s3, transfer
from tests.storage.faults import Choice, Request, harmful
from tests.storage.test_faults import Place, _impatient, digests, package, place, server

__all__ = ["_impatient", "place", "server"]


def once(fault: str, method: str, part: str = "") -> Choice:
    """Harm the first request of a method whose path has such a part."""
    harmed: list[Request] = []

    def choose(request: Request) -> str:
        if harmed or request.method != method or part not in request.path:
            return ""
        harmed.append(request)
        return fault

    return choose


def test_a_small_object_that_is_cut_is_read_again(place: Place) -> None:
    uri = place.publish(package(1), "here")
    with harmful(place.server, once("cut", "GET", "manifest.json")) as proxy:
        assert place.digests(uri, "there", proxy.url) == digests(package(1))
    assert proxy.met == ["cut"]


def test_a_small_object_whose_answer_was_lost_is_written(place: Place) -> None:
    """And whoever comes second is still refused."""
    place.store("here")
    with harmful(place.server, once("lost", "PUT")) as proxy:
        assert place.store("here", proxy.url).put_if_absent("promotions/1", b"mine")
        assert not place.store("here", proxy.url).put_if_absent("promotions/1", b"another's")
    assert proxy.met == ["lost"]
    assert place.store("here").read("promotions/1") == b"mine"


@pytest.mark.parametrize("fault", ["busy", "lost"])
def test_only_the_completion_of_a_file_is_asked_again(place: Place, fault: str) -> None:
    files = package(1, 12 << 20)
    with harmful(place.server, once(fault, "POST", "uploadId=")) as proxy:
        uri = place.publish(files, "here", proxy.url)
    assert proxy.met == [fault]
    assert len([request for request in proxy.asked if "partNumber=" in request.path]) == 3
    assert place.digests(uri, "there") == digests(files)
    assert place.uploads() == []


def test_a_large_file_that_arrived_is_not_sent_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "RETRIES", 1)
    files = package(1, 12 << 20)

    def is_manifest(request: Request) -> bool:
        return request.method == "PUT" and request.path.endswith("/manifest.json")

    with (
        harmful(place.server, lambda request: "busy" if is_manifest(request) else "") as proxy,
        pytest.raises(ForgeError, match="cannot be read"),
    ):
        place.publish(files, "here", proxy.url)
    with harmful(place.server, lambda request: "") as proxy:
        uri = place.publish(files, "here", proxy.url)
    assert [is_manifest(request) for request in proxy.asked if request.method == "PUT"] == [True]
    assert place.digests(uri, "there") == digests(files)


@pytest.mark.parametrize("server", ["moto"], indirect=True)  # rclone tells of no uploads
def test_a_sweep_goes_on_where_an_answer_was_lost(place: Place) -> None:
    place.store("here")
    for name in ("a", "b"):
        place.client._create_multipart_upload(place.bucket, f"a/prefix/models/{name}", {})
    with harmful(place.server, once("lost", "DELETE")) as proxy:
        place.store("here", proxy.url).sweep("models", timedelta(0))
    assert proxy.met == ["lost"]
    assert place.uploads() == []


@pytest.mark.parametrize("code", ["BadDigest", "XAmzContentSHA256Mismatch"])
def test_what_a_server_found_damaged_is_sent_again(code: str) -> None:
    refused = SimpleNamespace(status=400)
    assert transfer._passing(S3Error(refused, code, "", "", "", ""))  # type: ignore[arg-type]
    assert not transfer._passing(S3Error(refused, "InvalidArgument", "", "", "", ""))  # type: ignore[arg-type]
