"""A proxy on loopback that forwards requests to an S3 server and injects faults into some of them."""

import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

# The faults that the fewest requests allow come first.
FAULTS = {
    "flipped": "a byte of the response's body is changed",
    "tainted": "a byte of the request's body is changed",
    "broken": "both connections are reset in the middle of the request's body",
    "cut": "the response ends in the middle of its body",
    "busy": "503 with an S3 error",
    "sick": "503 from something in front of the S3 server",
    "refused": "reset, and the server never sees the request",
    "lost": "reset, after the server has executed the request",
    "late": "reset, and the server executes the request after the client has repeated it",
}
SILENT = "silent"  # no answer until the client gives up; not among FAULTS, since it takes the client's timeout
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
SICK = b"<html><body>Service Unavailable</body></html>"
HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding")
PATIENCE = 120  # seconds to wait for the S3 server


class Request(NamedTuple):
    """What decides whether a request meets a fault."""

    method: str
    path: str  # with the query
    size: int  # bytes of the body

    def allows(self, fault: str) -> bool:
        """Whether a fault makes sense here. Without TLS, only a file's own digest reveals a changed byte."""
        if fault in ("broken", "tainted"):
            return self.method == "PUT" and self.size > 1 and (fault == "broken" or self._is_file)
        if fault in ("cut", "flipped"):
            return self.method == "GET" and (fault == "cut" or self._is_file)
        return True

    @property
    def _is_file(self) -> bool:
        """Whether the object is a file that a manifest lists."""
        path = urlsplit(self.path).path
        return "/sha256-" in path and not path.endswith(("/manifest.json", "/model.sig"))


Choice = Callable[[Request], str]  # the name of the fault, or ""


def at_random(seed: int, rate: float) -> Choice:
    """Harm this share of the requests, each with the least frequent of the faults that it allows."""
    chance, chosen, mutex = random.Random(seed), Counter[str](), threading.Lock()

    def choose(request: Request) -> str:
        with mutex:
            if chance.random() >= rate:
                return ""
            fault = min(filter(request.allows, FAULTS), key=lambda fault: chosen[fault])
            chosen[fault] += 1
            return fault

    return choose


class Proxy(ThreadingHTTPServer):
    """Forwards requests to the server at a URL, with the faults that `choose` returns."""

    daemon_threads = False

    def __init__(self, server: str, choose: Choice) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.netloc, self.choose = urlsplit(server).netloc, choose
        self.requests: list[Request] = []
        self.faults: list[str] = []  # the names of those injected
        self.connections: set[socket.socket] = set()
        self._late: dict[tuple[str, str], list[Callable[[], object]]] = {}
        self._mutex = threading.Lock()

    def hold(self, request: Request, execute: Callable[[], object]) -> None:
        """Keep a late request until the client has repeated it, or the proxy ends."""
        with self._mutex:
            self._late.setdefault((request.method, request.path), []).append(execute)

    def execute_late(self, request: Request) -> None:
        """Execute the late requests that equal this one, which has just been answered."""
        with self._mutex:
            late = self._late.pop((request.method, request.path), [])
        for execute in late:
            execute()

    def end(self) -> None:
        """Accept nothing more, and execute all that has been received."""
        self.shutdown()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        self.server_close()  # waits for the handlers
        for late in self._late.values():
            for execute in late:
                execute()

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self.close_request(request)  # without the orderly end of the stream, which would precede a reset


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        super().finish()
        self.server.connections.discard(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client is gone
            super().handle()

    def forward(self) -> None:
        request = Request(self.command, self.path, int(self.headers.get("Content-Length") or 0))
        fault = self.server.choose(request)
        self.server.requests.append(request)
        if fault:
            self.server.faults.append(fault)
        body = bytearray(self.rfile.read(request.size // 2 if fault == "broken" else request.size))
        if fault in ("busy", "sick"):
            kind, text = ("application/xml", BUSY) if fault == "busy" else ("text/html", SICK)
            self.answer(503, {"Content-Type": kind, "Content-Length": str(len(text))}, text)
        elif fault == "refused":
            self.reset()
        elif fault == SILENT:
            self.connection.recv(1)  # returns when the client closes the connection
            self.reset()
        elif fault == "late":
            self.server.hold(request, lambda: self.send(bytes(body)))
            self.reset()
        elif fault == "broken":
            self.send(bytes(body), broken=True)
            self.reset()
        else:
            self.forward_whole(request, body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def forward_whole(self, request: Request, body: bytearray, fault: str) -> None:
        if fault == "tainted":
            body[len(body) // 3] ^= 1
        status, headers, found = self.send(bytes(body))
        if fault == "lost":
            self.reset()
            return
        if fault == "flipped" and found:
            found[len(found) // 3] ^= 1
        if fault == "cut":
            del found[len(found) // 2 :]
            self.close_connection = True
        self.answer(status, headers, bytes(found))
        self.server.execute_late(request)

    def send(self, body: bytes, broken: bool = False) -> tuple[int, dict[str, str], bytearray]:
        """Send the request as it came, since its signature covers Host. A broken one is reset after this much of it."""
        with contextlib.closing(HTTPConnection(self.server.netloc, timeout=PATIENCE)) as server:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                server.putheader(name, value)
            server.endheaders(body or None)
            if broken:
                _reset_when_closed(server.sock)
                return 0, {}, bytearray()
            answer = server.getresponse()
            found = bytearray(answer.read())
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
        if self.command != "HEAD":  # its Content-Length is that of the body it leaves out
            headers["Content-Length"] = str(len(found))
        return answer.status, headers, found

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reset(self) -> None:
        _reset_when_closed(self.connection)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _reset_when_closed(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def fault_proxy(server: str, choose: Choice) -> Iterator[Proxy]:
    """A proxy of the server at a URL. When it ends, the server has executed all that reached the proxy."""
    proxy = Proxy(server, choose)
    thread = threading.Thread(target=proxy.serve_forever, args=[0.01])
    thread.start()
    try:
        yield proxy
    finally:
        proxy.end()
        thread.join()
