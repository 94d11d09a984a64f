"""An S3 server whose users may do exactly what their policies in infra/ allow.

rclone stores the objects and checks signatures. A proxy in front of it checks policies, and forwards requests
unchanged, since their headers are signed.
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
BUCKET_ACTIONS = {"PUT": "CreateBucket", "POST": "PostObject", "DELETE": "DeleteBucket"}
BUCKET_QUERIES = {"location": "GetBucketLocation", "uploads": "ListBucketMultipartUploads"}
OBJECT_ACTIONS = {
    "GET": "GetObject",
    "HEAD": "GetObject",
    "PUT": "PutObject",
    "POST": "PutObject",
    "DELETE": "DeleteObject",
}
UPLOAD_ACTIONS = {"GET": "ListMultipartUploadParts", "DELETE": "AbortMultipartUpload"}
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
Permission = tuple[str, str]  # an action and a resource, without "s3:" and the prefix of ARNs


@dataclass
class Policy:
    """A policy document. A statement with an element that is not supported here is an error."""

    statements: list[dict[str, Any]]

    def __post_init__(self) -> None:
        for statement in self.statements:
            unknown = statement.keys() - {"Sid", "Effect", "Action", "Resource"}
            assert not unknown, f"{unknown} is not supported in a policy"

    def allows(self, permission: Permission) -> bool:
        """Whether a statement allows it and none denies it."""
        effects = {statement["Effect"] for statement in self.statements if self._applies(statement, permission)}
        return effects == {"Allow"}

    @staticmethod
    def _applies(statement: dict[str, Any], permission: Permission) -> bool:
        parts = zip(("Action", "Resource"), ("s3:", ARN), permission, strict=True)
        return all(
            any(_matches(pattern, prefix + value) for pattern in _as_list(statement[key]))
            for key, prefix, value in parts
        )


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _matches(pattern: str, value: str) -> bool:
    """Whether a value matches an AWS pattern, in which * and ? also match a slash."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), value, re.DOTALL) is not None


@dataclass
class S3:
    """The server: the secret keys and policies of its users, and what it denied, as (user, action, resource)."""

    url: str
    secrets: dict[str, str]
    policies: dict[str, Policy]
    denied: list[tuple[str, str, str]] = field(default_factory=list)

    def client(self, user: str) -> Minio:
        """A client with a user's credentials."""
        return Minio(urlsplit(self.url).netloc, user, self.secrets[user], secure=False, region="us-east-1")

    def check(self, user: str, permissions: list[Permission]) -> bool:
        """Whether a user has all of these permissions. Those that it lacks are recorded as denied."""
        policy = self.policies.get(user, Policy([]))
        missing = [(user, *permission) for permission in permissions if not policy.allows(permission)]
        self.denied += missing
        return not missing


def permissions_of(method: str, target: str, copy_source: str, body: bytes) -> list[Permission]:
    """The permissions for a request. `copy_source` is the header x-amz-copy-source, `body` is that of a bulk delete."""
    url = urlsplit(target)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    query = parse_qs(url.query, keep_blank_values=True)
    if not bucket:
        return [("ListAllMyBuckets", "*")]
    if key:
        action = UPLOAD_ACTIONS.get(method, OBJECT_ACTIONS[method]) if "uploadId" in query else OBJECT_ACTIONS[method]
        read = [("GetObject", unquote(copy_source).lstrip("/"))] if copy_source else []
        return [(action, f"{bucket}/{key}"), *read]
    if method == "POST" and "delete" in query:
        return [("DeleteObject", f"{bucket}/{element.text}") for element in xml.fromstring(body).iterfind(".//{*}Key")]  # noqa: S314
    action = next((action for name, action in BUCKET_QUERIES.items() if name in query), "ListBucket")
    return [(BUCKET_ACTIONS.get(method, action), bucket)]


def user_of(headers: Any, target: str) -> str:
    """The user whose access key a request names, "" if it has none. rclone checks the signature."""
    query = parse_qs(urlsplit(target).query)
    credential = re.search(r"Credential=([^/,\s]+)", headers.get("Authorization", ""))
    return credential[1] if credential else query.get("X-Amz-Credential", [""])[0].partition("/")[0]


class Proxy(BaseHTTPRequestHandler):
    """A client's connection, with a connection of its own to the backend."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def __init__(self, s3: S3, backend: str, *arguments: Any) -> None:
        self.s3, self.backend = s3, http.client.HTTPConnection(backend)
        super().__init__(*arguments)

    def handle_one_request(self) -> None:
        """Forward a request if its user has the permissions."""
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            super().handle_one_request()
            return
        self.close_connection = True

    def handle_expect_100(self) -> bool:
        """Answer "Expect: 100-continue" at once, so that the client sends the body."""
        result = super().handle_expect_100()
        self.wfile.flush()
        return result

    def finish(self) -> None:
        """Close both connections."""
        self.backend.close()
        with contextlib.suppress(ConnectionError):
            super().finish()

    def _forward(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        assert "Transfer-Encoding" not in self.headers, "S3 clients send a Content-Length"
        body = self.rfile.read(length) if "delete" in self.path else b""
        permissions = permissions_of(self.command, self.path, self.headers.get("x-amz-copy-source", ""), body)
        if not self.s3.check(user_of(self.headers, self.path), permissions):
            self.rfile.read(length - len(body))  # otherwise the client never reads the response
            return self._respond(403, {"Content-Type": "application/xml"}, DENIED)
        self.backend.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            self.backend.putheader(name, value)
        self.backend.endheaders(body or None)
        left = length - len(body)
        while left and (part := self.rfile.read(min(left, 1 << 20))):
            self.backend.send(part)
            left -= len(part)
        if left:
            raise ConnectionError("the client closed the connection")
        response = self.backend.getresponse()
        headers = {name: value for name, value in response.getheaders() if name != "Transfer-Encoding"}
        if response.length is None or self.command == "HEAD":  # a listing, or no body
            return self._respond(response.status, headers, response.read())
        self._respond(response.status, headers)
        shutil.copyfileobj(response, self.wfile)
        self.wfile.flush()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def _respond(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)
        self.wfile.flush()

    def log_message(self, *arguments: object) -> None:
        """Log nothing: there are too many requests."""


class Server(ThreadingHTTPServer):
    """The proxy's server."""

    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def serve(manifests: Manifests, directory: Path) -> Iterator[S3]:
    """Run a server with the buckets, users and policies of infra/, and its objects in a directory."""
    for bucket in BUCKETS:
        (directory / bucket).mkdir(parents=True)
    secrets = manifests.secrets["data-ml/minio-users"]
    texts = manifests.find("ConfigMap", "data-ml", "minio-policies")["data"]
    policies = {
        name.removesuffix(".json"): Policy(json.loads(text)["Statement"])
        for name, text in texts.items()
        if name.endswith(".json")
    }
    with rclone(directory, users=secrets) as backend:
        s3 = S3("", secrets, policies)
        server = Server(("127.0.0.1", 0), partial(Proxy, s3, urlsplit(backend).netloc))
        s3.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield s3
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
