"""A proxy on loopback that passes requests on to an S3 server, and does harm to some of them."""

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

FAULTS = {  # those first that the fewest requests can meet
    "flipped": "a byte of what is received is another one",
    "tainted": "a byte of what is sent is another one",
    "broken": "reset in the middle of the request's body, at the server too",
    "cut": "an answer that ends in the middle of its body",
    "busy": "503, as S3 says it",
    "sick": "503, as something before S3 says it",
    "refused": "reset, and the server has seen nothing",
    "lost": "reset after the server has done what was asked",
    "late": "no answer until the client has gone; only then is the server asked",
}
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
SICK = b"<html><body>Service Unavailable</body></html>"


class Request(NamedTuple):
    """What a fault is chosen by."""

    method: str
    path: str  # with the query
    size: int  # of the body

    def can_meet(self, fault: str) -> bool:
        """Whether a fault makes sense here. Without TLS nothing but its own digest tells of another byte."""
        if fault in ("broken", "tainted"):
            return self.method == "PUT" and self.size > 1 and (fault == "broken" or self._is_file)
        if fault in ("cut", "flipped"):
            return self.method == "GET" and (fault == "cut" or self._is_file)
        return True

    @property
    def _is_file(self) -> bool:
        """Whether it is about a file that a manifest tells of."""
        path = urlsplit(self.path).path
        return "/sha256-" in path and not path.endswith(("/manifest.json", "/model.sig"))


Choice = Callable[[Request], str]  # the name of a fault, or nothing


def at_random(seed: int, rate: float) -> Choice:
    """Harm so large a part of the requests, each in that way of those it can meet which was chosen least."""
    chance, chosen, mutex = random.Random(seed), Counter[str](), threading.Lock()

    def choose(request: Request) -> str:
        with mutex:
            if chance.random() >= rate:
                return ""
            fault = min(filter(request.can_meet, FAULTS), key=lambda fault: chosen[fault])
            chosen[fault] += 1
            return fault

    return choose


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server at a URL, but for the faults that `choose` names."""

    daemon_threads = False

    def __init__(self, server: str, choose: Choice, late: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.netloc, self.choose, self.late = urlsplit(server).netloc, choose, late
        self.asked: list[Request] = []
        self.met: list[str] = []  # faults
        self.ended = threading.Event()
        self.connections: set[socket.socket] = set()

    def end(self) -> None:
        """Let what was received be done, and receive nothing more."""
        self.ended.set()
        self.shutdown()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self.close_request(request)  # without a stream's usual end, which would come before a reset


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
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def pass_on(self) -> None:
        request = Request(self.command, self.path, int(self.headers.get("Content-Length") or 0))
        fault = self.server.choose(request)
        self.server.asked.append(request)
        if fault:
            self.server.met.append(fault)
        if fault in ("busy", "sick"):
            self.rfile.read(request.size)
            kind, text = ("application/xml", BUSY) if fault == "busy" else ("text/html", SICK)
            self.answer(503, {"Content-Type": kind, "Content-Length": str(len(text))}, text)
            return
        body = bytearray(self.rfile.read(request.size // 2 if fault == "broken" else request.size))
        if fault == "refused":
            self.reset()
            return
        if fault == "tainted":
            body[len(body) // 3] ^= 1
        if fault == "late":
            self.server.ended.wait(self.server.late)
        with contextlib.closing(HTTPConnection(self.server.netloc, timeout=60)) as server:
            self.send(server, bytes(body))
            if fault == "broken":
                _reset_at_its_end(server.sock)
                self.reset()
                return
            answer = server.getresponse()
            found = bytearray(answer.read())
        if fault in ("lost", "late"):
            self.reset()
            return
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
        if request.method != "HEAD":  # which tells the size of what it leaves out
            headers["Content-Length"] = str(len(found))
        if fault == "flipped" and found:
            found[len(found) // 3] ^= 1
        if fault == "cut":
            del found[len(found) // 2 :]
            self.close_connection = True
        self.answer(answer.status, headers, bytes(found))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def send(self, server: HTTPConnection, body: bytes) -> None:
        """Send the request as it came (its signature covers Host), or the beginning of it."""
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            server.putheader(name, value)
        server.endheaders(body or None)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reset(self) -> None:
        _reset_at_its_end(self.connection)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding")


def _reset_at_its_end(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def harmful(server: str, choose: Choice, late: float = 0) -> Iterator[Proxy]:
    """A proxy of the server at a URL; at its end the server has done all that has reached the proxy."""
    with Proxy(server, choose, late) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=[0.01])
        thread.start()
        try:
            yield proxy
        finally:
            proxy.end()
            thread.join()
