"""Public names: over HTTP with an app that records its requests, and message by message where timing matters."""

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from forge.serving.aliases import Message, PublicNames, Receive, Scope, Send

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize")
JSON = {"Content-Type": "application/json"}
CARD = {"id": "dates-1", "object": "model", "root": "/models/1", "permission": [{"id": "p"}]}


class Names:
    """The file of public names, as the reconciler replaces it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def point(self, **names: str | None) -> None:
        self.write(json.dumps({"names": names}))

    def write(self, text: str) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, self.path)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """A file in which `dates` points to `dates-1`, and `soon` to nothing yet."""
    file = Names(tmp_path / "names.json")
    file.point(dates="dates-1", soon=None)
    monkeypatch.setenv("SERVED_NAMES", str(file.path))
    return file


class Behind:
    """An app in place of vLLM. It records its requests, and pauses after each chunk of a stream until released.

    Most responses return the body of the request.
    """

    def __init__(self) -> None:
        self.given: list[tuple[str, dict[str, str], bytes]] = []
        self.released = threading.Semaphore(0)
        self.models: Response = JSONResponse({"object": "list", "data": [CARD]})
        echoing = [Route(path, self.echo, methods=["POST"]) for path in ROUTES]
        self.app = Starlette(
            routes=[
                *echoing,
                Route("/stream", self.stream, methods=["POST"]),
                Route("/busy", self.busy, methods=["POST"]),
                Route("/broken", self.broken, methods=["POST"]),
                Route("/v1/models", self.list_models),
                Route("/health", self.health),
            ]
        )

    async def keep(self, request: Request) -> bytes:
        body = await request.body()
        self.given.append((request.url.path, dict(request.headers), body))
        return body

    async def echo(self, request: Request) -> Response:
        return Response(await self.keep(request), media_type="application/json")

    async def stream(self, request: Request) -> Response:
        await self.keep(request)

        async def chunks() -> AsyncIterator[bytes]:
            for number in range(3):
                yield f"data: {number}\n\n".encode()
                while not self.released.acquire(blocking=False):
                    await asyncio.sleep(0.001)

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def busy(self, request: Request) -> Response:
        await self.keep(request)
        return Response(status_code=503)

    async def broken(self, request: Request) -> Response:
        await self.keep(request)
        raise RuntimeError("broken")

    async def list_models(self, request: Request) -> Response:
        return self.models

    async def health(self, request: Request) -> Response:
        return Response()


class Served:
    """The app with the middleware, on a port of this machine."""

    def __init__(self, port: int, behind: Behind) -> None:
        self.port, self.behind = port, behind

    def ask(
        self, method: str, path: str, body: bytes | Iterator[bytes] | None = None, headers: dict[str, str] = JSON
    ) -> HTTPResponse:
        """A response, whose body may not have arrived yet."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def post(self, path: str, **fields: Any) -> HTTPResponse:
        return self.ask("POST", path, json.dumps(fields).encode())

    def served(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.load(self.ask("GET", "/served"))
        return answer

    def count(self, version: str) -> dict[str, Any]:
        """The counts of a version, without the seconds."""
        count: dict[str, Any] = self.served()["versions"][version]
        assert count.pop("seconds") >= 0
        return count


@pytest.fixture
def served(names: Names) -> Iterator[Served]:
    behind = Behind()
    behind.app.add_middleware(PublicNames)  # as vLLM does
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(behind.app, log_level="critical", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        wait_until(lambda: server.started)
        yield Served(listening.getsockname()[1], behind)
        for _ in range(100):
            behind.released.release()
        server.should_exit = True
        thread.join()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def counts(in_flight: int = 0, requests: int = 0, errors: int = 0) -> dict[str, int]:
    return {"in_flight": in_flight, "requests": requests, "errors": errors}


# Over HTTP


@pytest.mark.parametrize("path", ROUTES)
def test_public_names_become_versions(served: Served, path: str) -> None:
    answer = served.post(path, model="dates", input="ß", nested={"model": "dates"})
    assert json.load(answer) == {"model": "dates-1", "input": "ß", "nested": {"model": "dates"}}
    assert answer.headers["x-served-version"] == "dates-1"
    _, headers, body = served.behind.given[0]
    assert headers["content-length"] == str(len(body))
    assert served.count("dates-1") == counts(requests=1)


def test_versioned_names_are_counted_and_unchanged(served: Served) -> None:
    body = b' {"model" :"dates-1"} '
    answer = served.ask("POST", "/v1/completions", body)
    assert (answer.read(), answer.headers["x-served-version"]) == (body, "dates-1")
    assert served.count("dates-1") == counts(requests=1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{ "messages":[] }',
        b'{"model": "another" }',
        b'{"model": null}',
        b'{"model": 7}',
        b'{"model": ["dates"]}',
        b'{"model": {"model": "dates"}}',
        b'["model", "dates"]',
        b'"dates"',
        b'{"model": "dates"',
        b'{"model": "dates"} {}',
        b"{'model': 'dates'}",
        b'{"model": "dates", "text": "\xff\x01"}',
        b'{"text":' + b"[" * 100_000,
    ],
    ids=lambda body: body[:30].decode(errors="replace"),
)
def test_everything_else_is_passed_on_byte_for_byte(served: Served, body: bytes) -> None:
    answer = served.ask("POST", "/v1/chat/completions", body)
    assert (answer.status, answer.read(), answer.headers["x-served-version"]) == (200, body, None)
    assert served.behind.given[0][2] == body
    assert served.served()["versions"].keys() == {"dates-1"}
    assert served.count("dates-1") == counts()


def test_only_json_is_read(served: Served) -> None:
    body = b'{"model": "dates"}'
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data; boundary=json"}):
        assert served.ask("POST", "/tokenize", body, headers).read() == body
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/problem+json ;a=b"):
        assert json.load(served.ask("POST", "/tokenize", body, {"content-type": kind})) == {"model": "dates-1"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"mod\\u0065l": "dates"}',
        b'{"model": "d\\u0061tes"}',
        b'{"model": "another", "model": "dates"}',
        b'{"model": "another", "mod\\u0065l": "\\u0064ates"}',
        b'{"model": 1, "temperature": 1e5, "model": "dates"}',
        b'{"model": "dates", "top_p": NaN, "bias": [-Infinity]}',
        b'{"model": "dates", "text": "\\ud83d"}',
        b'{"\\ud83d": 0, "model": "dates"}',
        b'\xef\xbb\xbf{"model": "dates"}',
        '{"model": "dates"}'.encode("utf-16"),
        '{"model": "dates"}'.encode("utf-32-le"),
    ],
)
def test_every_way_of_writing_a_name_in_json_is_resolved(served: Served, body: bytes) -> None:
    """The name is the one that Python's json, with which vLLM parses requests, would read."""
    answer = served.ask("POST", "/v1/completions", body)
    got, sent = json.loads(answer.read()), json.loads(body)
    assert got.pop("model") == "dates-1"
    assert sent.pop("model") == "dates"
    assert repr(got) == repr(sent)
    assert answer.headers["x-served-version"] == "dates-1"


def test_the_last_of_equal_keys_counts(served: Served) -> None:
    body = b'{"model": "dates", "model": "another"}'
    assert served.ask("POST", "/v1/completions", body).read() == body


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies(served: Served, chunked: bool) -> None:
    text = "0123456789abcdef" * (5_000_000 // 16)
    body = json.dumps({"text": text, "model": "dates"}).encode()
    parts = iter([body[:7], body[7:-9], body[-9:]]) if chunked else body
    assert json.load(served.ask("POST", "/v1/embeddings", parts)) == {"model": "dates-1", "text": text}
    _, given, received = served.behind.given[0]
    assert "transfer-encoding" not in given
    assert given["content-length"] == str(len(received))


def test_a_name_that_is_being_loaded(served: Served) -> None:
    answer = served.post("/v1/chat/completions", model="soon")
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    error = json.load(answer)["error"]
    assert "`soon` is being loaded" in error["message"]
    assert (error["code"], error["param"]) == (503, "model")
    assert served.behind.given == []
    assert served.served()["names"] == {"dates": "dates-1", "soon": None}


def test_openai_client_waits_for_a_name_that_is_being_loaded(served: Served, names: Names) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.InternalServerError, match="is being loaded") as refused:
        client.completions.create(model="soon", prompt="")
    assert refused.value.status_code == 503
    names.point(soon="soon-1")
    assert client.completions.create(model="soon", prompt="").model == "soon-1"


def test_streams_arrive_chunk_by_chunk(served: Served) -> None:
    answer = served.post("/stream", model="dates")
    assert answer.headers["x-served-version"] == "dates-1"
    for number in range(3):  # the app is still paused
        assert answer.read1() == f"data: {number}\n\n".encode()
        assert served.count("dates-1") == counts(in_flight=1, requests=1)
        served.behind.released.release()
    assert answer.read() == b""
    wait_until(lambda: served.count("dates-1") == counts(requests=1))


def test_a_request_stays_with_its_first_version(served: Served, names: Names) -> None:
    before = served.post("/stream", model="dates")
    names.point(dates="dates-2")
    found = served.served()
    assert found["names"] == {"dates": "dates-2"}
    assert {version: count["in_flight"] for version, count in found["versions"].items()} == {"dates-1": 1, "dates-2": 0}
    assert json.load(served.post("/tokenize", model="dates")) == {"model": "dates-2"}
    for _ in range(3):
        served.behind.released.release()
    assert before.read().count(b"data") == 3
    assert before.headers["x-served-version"] == "dates-1"
    wait_until(lambda: served.count("dates-1") == counts(requests=1))
    assert served.count("dates-2") == counts(requests=1)


def test_a_client_that_leaves_is_no_longer_in_flight(served: Served) -> None:
    connection = HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("POST", "/stream", b'{"model": "dates"}', JSON)
    answer = connection.getresponse()
    assert answer.read1() == b"data: 0\n\n"
    assert served.count("dates-1") == counts(in_flight=1, requests=1)
    answer.close()
    connection.close()
    wait_until(lambda: served.count("dates-1") == counts(requests=1))


def test_errors_are_counted(served: Served) -> None:
    assert served.post("/busy", model="dates").headers["x-served-version"] == "dates-1"
    assert served.post("/broken", model="dates").status == 500
    assert served.post("/nowhere", model="dates").status == 404
    wait_until(lambda: served.count("dates-1") == counts(requests=3, errors=2))


def test_seconds_are_summed(served: Served) -> None:
    answer = served.post("/stream", model="dates")
    assert served.served()["versions"]["dates-1"]["seconds"] == 0
    for _ in range(3):
        served.behind.released.release()
    answer.read()
    wait_until(lambda: served.served()["versions"]["dates-1"]["seconds"] > 0)


def test_invented_names_are_not_counted(served: Served) -> None:
    for number in range(20):
        assert served.post("/tokenize", model=f"invented-{number}").status == 200
    assert served.served()["versions"].keys() == {"dates-1"}


def test_earlier_versions_are_still_counted(served: Served, names: Names) -> None:
    assert served.count("dates-1") == counts()
    names.point(dates="dates-2")
    assert served.post("/tokenize", model="dates-1").headers["x-served-version"] == "dates-1"
    assert (served.count("dates-1"), served.count("dates-2")) == (counts(requests=1), counts())


def test_models_have_their_public_names(served: Served, names: Names) -> None:
    names.point(dates="dates-1", today="dates-1", soon=None, other="elsewhere", **{"dates-1": "dates-1"})
    answer = served.ask("GET", "/v1/models")
    body = answer.read()
    assert answer.headers["content-length"] == str(len(body))
    public = [CARD | {"id": name, "root": "dates-1"} for name in ("dates", "today")]
    assert json.loads(body) == {"object": "list", "data": [CARD, *public]}


@pytest.mark.parametrize(
    "unexpected",
    [
        Response(b"no json", media_type="application/json"),
        Response(b"[1]", media_type="application/json"),
        Response(b'{"data": {"id": "dates-1"}}', media_type="application/json"),
        Response(b'{"data": [{"id": ["dates-1"]}]}', media_type="application/json"),
        Response(b'{"data": "dates-1"}', media_type="application/json"),
        JSONResponse({"data": [CARD]}, status_code=401),
        Response(status_code=204),
    ],
)
def test_unexpected_lists_of_models_are_passed_on(served: Served, unexpected: Response) -> None:
    served.behind.models = unexpected
    answer = served.ask("GET", "/v1/models")
    assert (answer.status, answer.read()) == (unexpected.status_code, unexpected.body)


def test_other_requests_pass(served: Served) -> None:
    assert served.ask("GET", "/health", headers={}).status == 200
    assert served.ask("POST", "/served", b"{}").status == 404


def test_the_file_may_be_missing_or_broken(served: Served, names: Names, caplog: pytest.LogCaptureFixture) -> None:
    body = b'{"model": "dates"}'

    def led() -> str:
        model: str = json.load(served.ask("POST", "/tokenize", body))["model"]
        return model

    assert led() == "dates-1"
    with caplog.at_level(logging.WARNING, "forge.serving.aliases"):
        for broken in ("{", "[]", '{"names": {"dates": 7}}', "{}"):
            names.write(broken)
            assert (led(), led()) == ("dates-1", "dates-1")
        names.path.unlink()
        names.path.mkdir()  # in place of a file without read permission
        assert (led(), led()) == ("dates-1", "dates-1")
    assert len(caplog.records) == 5  # not one per request
    names.path.rmdir()
    assert led() == "dates"
    assert served.served()["names"] == {}
    names.point(dates="dates-2")
    assert led() == "dates-2"


# Message by message


def scope(path: str = "/v1/completions", method: str = "POST") -> Scope:
    return {"type": "http", "method": method, "path": path, "headers": [(b"content-type", b"application/json")]}


def receiving(*messages: Message) -> Receive:
    """Returns these messages, and then blocks."""
    left = list(messages)

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive


def part(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def nowhere(message: Message) -> None:
    """Collects a response."""


App = Callable[[Scope, Receive, Send], Awaitable[None]]


def test_without_a_file_there_are_no_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVED_NAMES", raising=False)
    given = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given.append(await receive())

    asyncio.run(PublicNames(app)(scope(), receiving(part(b'{"model": "dates"}')), nowhere))
    assert given == [part(b'{"model": "dates"}')]


def test_other_kinds_of_connection_are_passed_on(names: Names) -> None:
    given = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given.append((scope, receive, send))

    receive = receiving()
    for kind in ("lifespan", "websocket"):
        asyncio.run(PublicNames(app)({"type": kind}, receive, nowhere))
    assert given == [({"type": kind}, receive, nowhere) for kind in ("lifespan", "websocket")]


def test_split_bodies_and_the_disconnect_that_follows(names: Names) -> None:
    given = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given.extend([dict(scope["headers"])[b"content-length"], await receive(), await receive()])

    parts = [part(b'{"mod', True), {"type": "http.request", "more_body": True}, part(b'el":"dates"}')]
    disconnect = {"type": "http.disconnect"}
    original = scope()
    asyncio.run(PublicNames(app)(original, receiving(*parts, disconnect), nowhere))
    body = b'{"model":"dates-1"}'
    assert given == [str(len(body)).encode(), part(body), disconnect]
    assert original == scope()


def test_the_name_is_resolved_when_the_body_is_complete(names: Names) -> None:
    given = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        names.point(dates="dates-3")
        given.append((await receive())["body"])

    async def receive() -> Message:
        if not parts[1:]:
            names.point(dates="dates-2")
        return parts.pop(0)

    parts = [part(b'{"model":', True), part(b'"dates"}')]
    middleware = PublicNames(app)
    asyncio.run(middleware(scope(), receive, nowhere))
    assert given == [b'{"model":"dates-2"}']
    assert {version: count.requests for version, count in middleware.versions.items()} == {"dates-2": 1}


def test_a_client_that_leaves_before_its_request_is_complete(names: Names) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    middleware = PublicNames(app)
    asyncio.run(middleware(scope(), receiving(part(b"{", True), {"type": "http.disconnect"}), nowhere))
    assert middleware.versions == {}


def test_a_request_is_counted_before_anything_else_can_run(names: Names) -> None:
    """No other request is handled between resolving a name and counting the request."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(middleware.versions["dates-1"].in_flight)

    middleware = PublicNames(app)
    call = middleware(scope(), receiving(part(b'{"model":"dates"}')), nowhere)
    with pytest.raises(StopIteration):
        call.send(None)  # the coroutine finishes without awaiting anything
    assert seen == [1]
    assert middleware.versions["dates-1"].in_flight == 0


def test_a_cancelled_request_is_no_longer_in_flight(names: Names) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()

    middleware = PublicNames(app)

    async def run() -> None:
        task = asyncio.create_task(middleware(scope(), receiving(part(b'{"model":"dates"}')), nowhere))
        await asyncio.sleep(0)
        assert middleware.versions["dates-1"].in_flight == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    count = middleware.versions["dates-1"]
    assert (count.in_flight, count.requests, count.errors) == (0, 1, 0)


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_exceptions_are_passed_on_and_counted_once(names: Names, when: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if when != "before":
            await send({"type": "http.response.start", "status": 500, "headers": []})
        if when == "after":
            await send({"type": "http.response.body", "body": b""})
        raise RuntimeError

    middleware = PublicNames(app)
    with pytest.raises(RuntimeError):
        asyncio.run(middleware(scope(), receiving(part(b'{"model":"dates"}')), nowhere))
    count = middleware.versions["dates-1"]
    assert (count.in_flight, count.requests, count.errors) == (0, 1, 1)


def test_a_request_ends_with_the_last_byte_of_its_response(names: Names) -> None:
    """Background tasks after the response don't count as in flight."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        for more in (True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more})
            seen.append(middleware.versions["dates-1"].in_flight)

    middleware = PublicNames(app)
    asyncio.run(middleware(scope(), receiving(part(b'{"model":"dates"}')), nowhere))
    assert seen == [1, 0]


def test_each_replacement_of_the_file_is_seen(names: Names) -> None:
    """Even if files of the same length replace each other within one tick of the file system's clock."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given.append(json.loads((await receive())["body"])["model"])

    given: list[str] = []
    middleware = PublicNames(app)
    versions = [f"dates-{number}" for number in range(1000, 1300)]
    for version in versions:
        names.point(dates="another-one")
        names.point(dates=version)
        os.utime(names.path, ns=(0, 0))
        asyncio.run(middleware(scope(), receiving(part(b'{"model":"dates"}')), nowhere))
    assert given == versions
