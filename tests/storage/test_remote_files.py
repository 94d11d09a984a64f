"""Remote sources, read over HTTP from an S3 server and from a server of the Hub's API, both in this process."""

import contextlib
import gzip
import hashlib
import io
import json
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest
from minio import Minio
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.storage.remote_files import download_files, identify, is_remote
from tests.storage.servers import SECRET, client_of, settings_of, shared_server

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
NOWHERE = "http://127.0.0.1:9"


# --- S3


@pytest.fixture
def server() -> str:
    """URL of an S3 server in this process."""
    return shared_server("moto")


class Bucket:
    """A bucket, and settings to read it."""

    def __init__(self, server: str) -> None:
        self.client: Minio = client_of(server)
        self.settings = settings_of(server)
        self.client.make_bucket("rows")

    def put(self, key: str, text: str | bytes, **headers: str) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.client.put_object("rows", key, io.BytesIO(data), len(data), metadata=headers, part_size=5 << 20)


@pytest.fixture
def bucket(server: str) -> Bucket:
    """The empty bucket s3://rows. All other buckets are deleted."""
    send("POST", f"{server}/moto-api/reset")
    return Bucket(server)


def send(method: str, url: str, data: bytes = b"") -> None:
    request = urllib.request.Request(url, data, {"Content-Type": "text/plain"}, method=method)  # noqa: S310
    urllib.request.urlopen(request).close()  # noqa: S310


def texts(fetched: list[tuple[str, Path]]) -> dict[str, str]:
    """Contents by URI."""
    return {name: path.read_text() for name, path in fetched}


Answer = Callable[[str, Callable[[], bytes]], Iterable[bytes]]  # from a path and a function that returns the whole body


@contextlib.contextmanager
def tampering(answer: Answer) -> Iterator[str]:
    """URL of another server with the same buckets, whose responses a function changes."""
    moto = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict, start_response: Callable) -> Iterable[bytes]:
        return answer(environ["PATH_INFO"], lambda: b"".join(moto(environ, start_response)))

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def tampered(bucket: Bucket) -> Iterator[Callable[[Answer], Settings]]:
    """Starts such a server; returns settings for it."""
    with contextlib.ExitStack() as servers:
        yield lambda answer: settings_of(servers.enter_context(tampering(answer)))


def test_remote_sources_have_an_s3_or_hf_uri() -> None:
    assert is_remote("s3://rows/a")
    assert is_remote("hf://datasets/someone/rows")
    assert not is_remote("rows/s3")
    assert not is_remote("file:///rows")
    assert not is_remote("demonstration")


def test_s3_objects_of_a_prefix_are_downloaded_in_order(bucket: Bucket, tmp_path: Path) -> None:
    rows = {f"raw/part-{number}/rows.jsonl": f"rows {number}\n" for number in range(40)}
    for key, text in rows.items():
        bucket.put(key, text)
    fetched = download_files("s3://rows/raw", tmp_path / "rows", bucket.settings, SUFFIXES)
    assert texts(fetched) == {f"s3://rows/{key}": text for key, text in rows.items()}
    assert [name for name, _ in fetched] == sorted(f"s3://rows/{key}" for key in rows)
    assert sorted(path for _, path in fetched) == sorted((tmp_path / "rows").iterdir())
    assert download_files("s3://rows/raw/", tmp_path / "again", bucket.settings, SUFFIXES)[0][0] == fetched[0][0]
    assert len(download_files("s3://rows", tmp_path / "all", bucket.settings, SUFFIXES)) == len(rows)


def test_s3_one_object(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("raw/a.jsonl", "one")
    bucket.put("raw/a.jsonl.gz", "another")
    fetched = download_files("s3://rows/raw/a.jsonl", tmp_path, bucket.settings, SUFFIXES)
    assert texts(fetched) == {"s3://rows/raw/a.jsonl": "one"}


def test_s3_other_suffixes_and_similar_prefixes_are_skipped(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("raw/a.jsonl", "raw/README.md", "raw/_SUCCESS", "raw-old/a.jsonl", "raw.jsonl"):
        bucket.put(key, key)
    fetched = download_files("s3://rows/raw", tmp_path, bucket.settings, SUFFIXES)
    assert texts(fetched) == {"s3://rows/raw/a.jsonl": "raw/a.jsonl"}
    assert "skipped 1 files of unknown type in s3://rows/raw: raw/README.md" in caplog.messages
    _, digest = identify("s3://rows/raw", bucket.settings, SUFFIXES)
    bucket.put("raw/notes.txt", "not data")
    assert identify("s3://rows/raw", bucket.settings, SUFFIXES)[1] == digest


def test_s3_compressed_files_keep_their_ending_and_bytes(bucket: Bucket, tmp_path: Path) -> None:
    data = gzip.compress(b"rows\n", mtime=0)
    bucket.put("raw/a.jsonl.gz", data)
    bucket.put("raw/B.JSONL.GZ", data, **{"Content-Encoding": "gzip"})
    fetched = download_files("s3://rows/raw", tmp_path, bucket.settings, SUFFIXES)
    assert [name for name, _ in fetched] == ["s3://rows/raw/B.JSONL.GZ", "s3://rows/raw/a.jsonl.gz"]
    for _, path in fetched:
        assert path.name.endswith(".jsonl.gz")
        assert path.read_bytes() == data


def test_s3_multipart_objects_are_downloaded(bucket: Bucket, tmp_path: Path) -> None:
    data = bytes(range(256)) * (6 << 12)  # 6 MiB in parts of 5
    bucket.put("raw/a.jsonl", data)
    (item,) = bucket.client.list_objects("rows", recursive=True)
    assert "-" in str(item.etag)
    ((_, path),) = download_files("s3://rows/raw", tmp_path, bucket.settings, SUFFIXES)
    assert path.read_bytes() == data


def test_s3_digest_covers_the_contents(bucket: Bucket) -> None:
    for prefix in ("one", "two/deeper"):
        bucket.put(f"{prefix}/a.jsonl", "a")
        bucket.put(f"{prefix}/b.jsonl", "b")
    uri, digest = identify("s3://rows/one", bucket.settings, SUFFIXES)
    assert uri == "s3://rows/one"
    assert identify("s3://rows/two", bucket.settings, SUFFIXES)[1] == digest
    bucket.put("one/b.jsonl", "c")
    assert identify("s3://rows/one", bucket.settings, SUFFIXES)[1] != digest


def test_s3_keys_never_lead_outside_the_directory(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("raw//a.jsonl", "absolute")
    bucket.put(f"raw/{'a' * 300}.jsonl", "long")
    fetched = download_files("s3://rows/raw", tmp_path / "rows", bucket.settings, SUFFIXES)
    assert sorted(texts(fetched).values()) == ["absolute", "long"]
    assert {path.parent for _, path in fetched} == {tmp_path / "rows"}
    send("PUT", f"{bucket.settings.s3_endpoint}/rows/raw/../../a.jsonl", b"escaped")
    with pytest.raises(ForgeError, match=r"'\.\.' path segment is not supported; correct the name"):
        download_files("s3://rows/raw", tmp_path / "rows", bucket.settings, SUFFIXES)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("source", ["s3://rows", "s3://rows/raw", "s3://rows/raw/a.jsonl", "s3://rows/raw/notes.txt"])
def test_s3_without_data_files_is_an_error(bucket: Bucket, source: str, tmp_path: Path) -> None:
    bucket.put("raw/notes.txt", "not data")
    with pytest.raises(ForgeError, match=rf"data {source}: contains no data file \(known are \.jsonl, "):
        identify(source, bucket.settings, SUFFIXES)
    with pytest.raises(ForgeError, match="contains no data file"):
        download_files(source, tmp_path, bucket.settings, SUFFIXES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://elsewhere/raw", "NoSuchBucket .*check the bucket's name"),
        ("s3://", "invalid bucket name"),
        ("s3://No Bucket/raw", "invalid bucket name No Bucket"),
    ],
)
def test_s3_missing_bucket_is_an_error(bucket: Bucket, source: str, message: str) -> None:
    with pytest.raises(ForgeError, match=f"data {source}: .*{message}"):
        identify(source, bucket.settings, SUFFIXES)


def test_s3_missing_settings_are_named() -> None:
    with pytest.raises(ForgeError) as caught:
        identify("s3://rows/raw", Settings(s3_endpoint=NOWHERE), SUFFIXES)
    assert "set FORGE_S3_ACCESS_KEY, FORGE_S3_SECRET_KEY (or" in caught.value.message


def test_s3_refused_credentials_are_not_shown(bucket: Bucket, server: str) -> None:
    send("POST", f"{server}/moto-api/reset-auth", b"0")
    try:
        with pytest.raises(ForgeError, match=r"InvalidAccessKeyId .*check FORGE_S3_ACCESS_KEY") as caught:
            identify("s3://rows/raw", bucket.settings, SUFFIXES)
    finally:
        send("POST", f"{server}/moto-api/reset-auth", b"inf")
    assert SECRET not in caught.value.message


def test_s3_unreachable_server_is_an_error() -> None:
    with pytest.raises(ForgeError, match=f"{NOWHERE} cannot be read .*refused.*; check FORGE_S3_ENDPOINT"):
        identify("s3://rows/raw", settings_of(NOWHERE), SUFFIXES)


def test_s3_server_of_another_kind_is_an_error(hub: "Hub") -> None:
    hub.answers["/rows"] = b"<html><p>a console</html>"
    with pytest.raises(ForgeError, match="does not answer like an S3 server; set FORGE_S3_ENDPOINT"):
        identify("s3://rows/raw", settings_of(hub.url), SUFFIXES)
    with pytest.raises(ForgeError, match="does not answer like an S3 server; set FORGE_S3_ENDPOINT"):
        identify("s3://unknown/raw", settings_of(hub.url), SUFFIXES)


def test_s3_an_interrupted_download_starts_again(bucket: Bucket, tampered: Callable, tmp_path: Path) -> None:
    bucket.put("raw/a.jsonl", "whole")
    cuts = iter([1])

    def cut(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        body = serve()
        return [body[: -next(cuts, 0) or None] if path.endswith(".jsonl") else body]

    fetched = download_files("s3://rows/raw", tmp_path, tampered(cut), SUFFIXES)
    assert texts(fetched) == {"s3://rows/raw/a.jsonl": "whole"}
    assert next(cuts, None) is None


@pytest.mark.parametrize("harm", [lambda body: body[:-1], lambda body: body[:-1] + b"?"])
def test_s3_a_file_that_always_arrives_damaged_is_an_error(
    bucket: Bucket, tampered: Callable, tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    bucket.put("raw/a.jsonl", "good")
    bucket.put("raw/b.jsonl", "harmed")
    harmed = tampered(lambda path, serve: [harm(serve()) if path.endswith("b.jsonl") else serve()])
    with pytest.raises(ForgeError, match=r"data s3://rows/raw: .*(cannot be read .*|raw/b.jsonl arrived damaged)"):
        download_files("s3://rows/raw", tmp_path, harmed, SUFFIXES)
    assert {path.read_text() for path in tmp_path.glob("*.jsonl")} <= {"good"}


def test_s3_an_object_that_changes_meanwhile_is_an_error(bucket: Bucket, tampered: Callable, tmp_path: Path) -> None:
    bucket.put("raw/a.jsonl", "before")

    def change(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        if path.endswith(".jsonl"):
            bucket.put("raw/a.jsonl", "after!")
        return [serve()]

    with pytest.raises(ForgeError, match=r"s3://rows/raw/a\.jsonl: changed during the download; run again"):
        download_files("s3://rows/raw", tmp_path, tampered(change), SUFFIXES)
    assert list(tmp_path.iterdir()) == []


def test_s3_a_failure_cancels_the_other_downloads(bucket: Bucket, tampered: Callable, tmp_path: Path) -> None:
    size = 64 << 20
    bucket.put("raw/a.jsonl", "a")
    bucket.put("raw/b.jsonl", bytes(size))
    started = threading.Event()
    sent = []

    def answer(path: str, serve: Callable[[], bytes]) -> Iterable[bytes]:
        body = serve()
        if path.endswith("a.jsonl"):
            assert started.wait(60)
            return [b"?"]
        return drip(body) if path.endswith("b.jsonl") else [body]

    def drip(body: bytes) -> Iterator[bytes]:
        for start in range(0, size, 1 << 20):
            sent.append(start)
            yield body[start : start + (1 << 20)]
            started.set()
            threading.Event().wait(0.2)

    with pytest.raises(ForgeError, match="damaged"):
        download_files("s3://rows/raw", tmp_path, tampered(answer), SUFFIXES)
    assert len(sent) < 64
    assert list(tmp_path.glob("*.jsonl")) == []


# --- the Hub


class Hub(ThreadingHTTPServer):
    """The Hub's API for data sets: their commits, trees and files."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, bytes] = {}
        self.denied: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.requests: list[str] = []
        self.errors = "RepoNotFound"

    def commit(self, repository: str, files: dict[str, str], *branches: str) -> str:
        """Add a commit and point branches at it; returns its hash."""
        commit = hashlib.sha1(json.dumps([repository, files]).encode(), usedforsecurity=False).hexdigest()
        info = json.dumps({"id": repository, "sha": commit, "siblings": []}).encode()
        api = f"/api/datasets/{repository}"
        self.answers |= {f"{api}/revision/{name}": info for name in (commit, *branches)}
        if "main" in branches:
            self.answers[api] = info
        tree = [{"type": "directory", "path": "data", "oid": commit}]
        for path, text in files.items():
            size = self.sizes.get(path, len(text))
            tree.append({"type": "file", "path": path, "size": size, "oid": commit})
            self.answers[f"/datasets/{repository}/resolve/{commit}/{path}"] = text.encode()
        self.answers[f"{api}/tree/{commit}"] = json.dumps(tree).encode()
        return commit


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    codes: ClassVar = {"RepoNotFound": 404, "RevisionNotFound": 404, "GatedRepo": 403}

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        body = self.server.answers.get(path)
        if body is None:
            known = any(path.startswith(f"{name}/revision/") for name in self.server.answers)
            error = self.server.denied.get(path, "RevisionNotFound" if known else "RepoNotFound")
            self.send_response(self.codes[error])
            self.send_header("X-Error-Code", error)
            body = b""
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            if "/resolve/" in path:
                self.send_header("X-Repo-Commit", path.split("/")[5])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, which HF_ENDPOINT names."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
        server.shutdown()
        thread.join()


FILES = {
    "README.md": "about",
    "script.py": "raise SystemExit",
    "data/a.jsonl": "rows a",
    "data/B.JSONL": "rows b",
    "data/more [1]/c.parquet": "rows c",
    "data-old/d.jsonl": "rows d",
}


def test_hub_source_is_pinned_to_a_commit(hub: Hub) -> None:
    first = hub.commit("someone/rows", FILES, "main", "v1", "refs/pr/1", "odd/name")
    pinned, digest = identify("hf://datasets/someone/rows", Settings(), SUFFIXES)
    assert pinned == f"hf://datasets/someone/rows@{first}"
    assert not any("/resolve/" in path for path in hub.requests)
    second = hub.commit("someone/rows", {**FILES, "data/a.jsonl": "rows A"}, "main")
    later, other = identify("hf://datasets/someone/rows", Settings(), SUFFIXES)
    assert (later, other != digest) == (f"hf://datasets/someone/rows@{second}", True)
    for revision in (first, "v1", "refs/pr/1", "odd%2Fname"):
        assert identify(f"hf://datasets/someone/rows@{revision}", Settings(), SUFFIXES) == (pinned, digest)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", ["data-old/d.jsonl", "data/B.JSONL", "data/a.jsonl", "data/more [1]/c.parquet"]),
        ("/data", ["data/B.JSONL", "data/a.jsonl", "data/more [1]/c.parquet"]),
        ("/data/", ["data/B.JSONL", "data/a.jsonl", "data/more [1]/c.parquet"]),
        ("/data/a.jsonl", ["data/a.jsonl"]),
        ("/data/more [1]", ["data/more [1]/c.parquet"]),
    ],
)
def test_hub_files_of_a_path_are_downloaded(hub: Hub, tmp_path: Path, path: str, names: list[str]) -> None:
    commit = hub.commit("someone/rows", FILES, "main")
    pinned, _ = identify(f"hf://datasets/someone/rows{path}", Settings(), SUFFIXES)
    hub.commit("someone/rows", {"data/a.jsonl": "later"}, "main")
    fetched = download_files(pinned, tmp_path, Settings(), SUFFIXES)
    shown = f"hf://datasets/someone/rows@{commit}/"
    assert list(texts(fetched).items()) == [(f"{shown}{name}", FILES[name]) for name in names]
    assert {path for path in hub.requests if "/resolve/" in path} == {
        f"/datasets/someone/rows/resolve/{commit}/{name}" for name in names
    }


def test_hub_digest_covers_commit_and_path(hub: Hub) -> None:
    hub.commit("someone/rows", FILES, "main")
    sources = (
        "hf://datasets/someone/rows",
        "hf://datasets/someone/rows/data",
        "hf://datasets/someone/rows/data/a.jsonl",
    )
    assert len({identify(source, Settings(), SUFFIXES)[1] for source in sources}) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://datasets/someone/else", "no such data set, or a private one; check its name, or set HF_TOKEN"),
        ("hf://datasets/someone/gated", "its owner restricts access; .* set HF_TOKEN"),
        ("hf://datasets/someone/rows@v9", "no such revision"),
        ("hf://datasets/someone/rows/nowhere", "contains no data file"),
        ("hf://datasets/someone/rows/README.md", "contains no data file"),
        ("hf://datasets/rows", "write it as hf://datasets/OWNER/NAME"),
        ("hf://someone/rows", "write it as hf://datasets/OWNER/NAME"),
    ],
)
def test_hub_missing_sources_are_errors(hub: Hub, tmp_path: Path, source: str, message: str) -> None:
    hub.commit("someone/rows", FILES, "main")
    hub.denied["/api/datasets/someone/gated"] = "GatedRepo"
    with pytest.raises(ForgeError, match=f"data {source}: .*{message}"):
        identify(source, Settings(), SUFFIXES)
    with pytest.raises(ForgeError, match=message):
        download_files(source, tmp_path, Settings(), SUFFIXES)


def test_hub_unreachable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(ForgeError, match=r"cannot be read .*refused.*; check the network, HF_ENDPOINT"):
        identify("hf://datasets/someone/rows", Settings(), SUFFIXES)


def test_hub_file_of_another_size_is_an_error(hub: Hub, tmp_path: Path) -> None:
    hub.sizes["a.jsonl"] = 5
    hub.commit("someone/rows", {"a.jsonl": "rows"}, "main")
    with pytest.raises(ForgeError, match=r"a\.jsonl arrived with 4 bytes instead of 5; run again"):
        download_files("hf://datasets/someone/rows", tmp_path, Settings(), SUFFIXES)


def test_a_full_disk_is_an_error_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.sizes["a.jsonl"] = 1 << 60
    hub.commit("someone/rows", {"a.jsonl": "rows"}, "main")
    with pytest.raises(
        ForgeError, match=r"^disk .* is full \(.* free, 1152921504.6 GB wanted\): the rows of hf://.* cannot be written"
    ):
        download_files("hf://datasets/someone/rows", tmp_path, Settings(), SUFFIXES)
    assert list(tmp_path.iterdir()) == []


def test_hub_paths_never_lead_outside_the_directory(hub: Hub, tmp_path: Path) -> None:
    hub.commit("someone/rows", {"../a.jsonl": "escaped"}, "main")
    with pytest.raises(ForgeError, match="cannot contain"):
        download_files("hf://datasets/someone/rows", tmp_path / "rows", Settings(), SUFFIXES)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
