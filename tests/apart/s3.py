"""An S3 server with users, each of which may do what its policy in infra/ says, and no more.

rclone keeps the objects and checks signatures; a proxy in front of it checks policies. It passes requests on as they
are, since the headers are signed.
"""

import contextlib
import http.client
import json
import re
import shutil
import threading
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from minio import Minio

from tests.apart.manifests import Manifests
from tests.storage.servers import rclone

BUCKETS = ("models", "datasets", "flyte", "mlflow")
ARN = "arn:aws:s3:::"
OF_BUCKETS = {"PUT": "CreateBucket", "POST": "PostObject", "DELETE": "DeleteBucket"}
ON_BUCKETS = {"location": "GetBucketLocation", "uploads": "ListBucketMultipartUploads"}
ACTIONS = {"GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject", "POST": "PutObject", "DELETE": "DeleteObject"}
OF_UPLOADS = {"GET": "ListMultipartUploadParts", "DELETE": "AbortMultipartUpload"}
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
Right = tuple[str, str]  # an action and a resource, without s3: and the ARN's beginning


@dataclass
class Policy:
    """A policy document; a statement with parts that are not read here is an error, not a right."""

    statements: list[dict[str, Any]]

    def __post_init__(self) -> None:
        for one in self.statements:
            unknown = one.keys() - {"Sid", "Effect", "Action", "Resource"}
            assert not unknown, f"the proxy of these tests does not know {unknown} of a policy"

    def allows(self, right: Right) -> bool:
        """Whether a statement allows it and none denies it."""
        effects = {one["Effect"] for one in self.statements if self._about(one, right)}
        return effects == {"Allow"}

    @staticmethod
    def _about(statement: dict[str, Any], right: Right) -> bool:
        named = zip(("Action", "Resource"), ("s3:", ARN), right, strict=True)
        return all(any(_like(one, before + value) for one in _listed(statement[key])) for key, before, value in named)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _like(pattern: str, value: str) -> bool:
    """Whether a value matches a pattern as AWS has them: * and ? stand for anything, / included."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), value, re.DOTALL) is not None


@dataclass
class S3:
    """The server: its users' secret keys and policies, and what was denied as (user, action, resource)."""

    url: str
    secrets: dict[str, str]
    policies: dict[str, Policy]
    denied: list[tuple[str, str, str]] = field(default_factory=list)

    def client(self, user: str) -> Minio:
        """A client of a user."""
        return Minio(urlsplit(self.url).netloc, user, self.secrets[user], secure=False, region="us-east-1")

    def check(self, user: str, rights: list[Right]) -> bool:
        """Whether a user has all these rights; what it lacks is recorded."""
        policy = self.policies.get(user, Policy([]))
        lacking = [(user, *right) for right in rights if not policy.allows(right)]
        self.denied += lacking
        return not lacking


def rights_of(method: str, target: str, copied: str, body: bytes) -> list[Right]:
    """What a request needs. `copied` is its header x-amz-copy-source, `body` that of a deletion of many objects."""
    url = urlsplit(target)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    query = parse_qs(url.query, keep_blank_values=True)
    if not bucket:
        return [("ListAllMyBuckets", "*")]
    if key:
        action = OF_UPLOADS.get(method, ACTIONS[method]) if "uploadId" in query else ACTIONS[method]
        read = [("GetObject", unquote(copied).lstrip("/"))] if copied else []
        return [(action, f"{bucket}/{key}"), *read]
    if method == "POST" and "delete" in query:
        return [("DeleteObject", f"{bucket}/{one.text}") for one in xml.fromstring(body).iterfind(".//{*}Key")]  # noqa: S314
    asked = next((action for name, action in ON_BUCKETS.items() if name in query), "ListBucket")
    return [(OF_BUCKETS.get(method, asked), bucket)]


def user_of(headers: Any, target: str) -> str:
    """Whose access key signs a request, "" for nobody's. rclone looks whether it does."""
    query = parse_qs(urlsplit(target).query)
    credential = re.search(r"Credential=([^/,\s]+)", headers.get("Authorization", ""))
    return credential[1] if credential else query.get("X-Amz-Credential", [""])[0].partition("/")[0]


class Proxy(BaseHTTPRequestHandler):
    """One client's connection, and one of its own to the server behind."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def __init__(self, s3: S3, behind: str, *arguments: Any) -> None:
        self.s3, self.behind = s3, http.client.HTTPConnection(behind)
        super().__init__(*arguments)

    def handle_one_request(self) -> None:
        """Pass a request on, if its user has the rights for it."""
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            super().handle_one_request()
            return
        self.close_connection = True

    def handle_expect_100(self) -> bool:
        """Have the client send a body that it asks leave for."""
        done = super().handle_expect_100()
        self.wfile.flush()
        return done

    def finish(self) -> None:
        """Close both connections."""
        self.behind.close()
        with contextlib.suppress(ConnectionError):
            super().finish()

    def _pass(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        assert "Transfer-Encoding" not in self.headers, "S3's clients send a Content-Length"
        body = self.rfile.read(length) if "delete" in self.path else b""
        rights = rights_of(self.command, self.path, self.headers.get("x-amz-copy-source", ""), body)
        if not self.s3.check(user_of(self.headers, self.path), rights):
            self.rfile.read(length - len(body))  # or the client never reads the answer
            return self._answer(403, {"Content-Type": "application/xml"}, DENIED)
        self.behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            self.behind.putheader(name, value)
        self.behind.endheaders(body or None)
        left = length - len(body)
        while left and (part := self.rfile.read(min(left, 1 << 20))):
            self.behind.send(part)
            left -= len(part)
        if left:
            raise ConnectionError("the client is gone")
        answer = self.behind.getresponse()
        headers = {name: value for name, value in answer.getheaders() if name != "Transfer-Encoding"}
        if answer.length is None or self.command == "HEAD":  # a listing, or nothing
            return self._answer(answer.status, headers, answer.read())
        self._answer(answer.status, headers)
        shutil.copyfileobj(answer, self.wfile)
        self.wfile.flush()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)
        self.wfile.flush()

    def log_message(self, *arguments: object) -> None:
        """Say nothing: there are many."""


class Server(ThreadingHTTPServer):
    """The proxy's."""

    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def serve(manifests: Manifests, directory: Path) -> Iterator[S3]:
    """A server with the buckets, users and policies of infra/, which keeps objects in a directory."""
    for bucket in BUCKETS:
        (directory / bucket).mkdir(parents=True)
    secrets = manifests.secrets["data-ml/minio-users"]
    texts = manifests.find("ConfigMap", "data-ml", "minio-policies")["data"]
    policies = {
        name.removesuffix(".json"): Policy(json.loads(text)["Statement"])
        for name, text in texts.items()
        if name.endswith(".json")
    }
    with rclone(directory, users=secrets) as behind:
        s3 = S3("", secrets, policies)
        server = Server(("127.0.0.1", 0), partial(Proxy, s3, urlsplit(behind).netloc))
        s3.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield s3
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
