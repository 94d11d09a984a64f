"""Public names: ASGI middleware in vLLM's API server, `vllm --middleware forge.serving.aliases.PublicNames`.

vLLM itself knows only versioned names. The reconciler writes the mapping to the file $SERVED_NAMES, for example
`{"names": {"dates": "dates-0123456789ab"}}`, with null for a model that is still being loaded. A request's public name
is resolved once, when its body has arrived, and the request is counted for that version in the same step. So once
GET /served shows the new names, no new request can reach the old version, and it can be unloaded when its in_flight
count is 0. The counts are per process, so vLLM must run with one API server. This module runs in vLLM's environment:
it imports msgspec, and nothing from this project.
"""

import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, BinaryIO

import msgspec

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

log = logging.getLogger(__name__)


class Content(msgspec.Struct):
    """The contents of the names file."""

    names: dict[str, str | None]


class Count(msgspec.Struct):
    """The requests to a version. `seconds` is the total duration of those that have ended, from body to last byte."""

    in_flight: int = 0
    requests: int = 0
    errors: int = 0
    seconds: float = 0.0


FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])  # values are skipped, not parsed
CONTENT = msgspec.json.Decoder(Content)


class NamesFile:
    """The file of public names, read again whenever it has been replaced."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.names: dict[str, str | None] = {}
        self._state: tuple[int, ...] = ()
        self._file: BinaryIO | None = None
        self._warned = ""

    def refresh(self) -> None:
        """Update `names`: none if there is no file, and unchanged if it can't be read."""
        try:
            if state(os.stat(self.path)) == self._state:
                return
            file = open(self.path, "rb")  # noqa: SIM115
        except (FileNotFoundError, NotADirectoryError):
            self._keep(None, ())
            self.names = {}
            return
        except OSError as error:  # for example too many open files; the next request tries again
            self._warn(str(error))
            return
        # Kept open, so that the file that replaces it can't get the same inode number.
        self._keep(file, state(os.fstat(file.fileno())))
        try:
            self.names, self._warned = CONTENT.decode(file.read()).names, ""
        except (OSError, ValueError) as error:
            self._warn(str(error))

    def _keep(self, file: BinaryIO | None, new: tuple[int, ...]) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._state = file, new

    def _warn(self, problem: str) -> None:
        if problem != self._warned:
            log.warning("%s: %s; public names stay as they were", self.path, problem)
        self._warned = problem


class PublicNames:
    """The middleware."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.file = NamesFile(os.environ.get("SERVED_NAMES", ""))
        self.versions: dict[str, Count] = {}  # only targets of public names, so that clients can't add entries

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or pass it on to vLLM."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        match scope["method"], scope["path"].removeprefix(scope.get("root_path", "")):
            case "GET", "/served":
                await answer(send, 200, {"names": self._names(), "versions": self.versions})
            case "GET", "/v1/models":
                await self._models(scope, receive, send)
            case "POST", _ if has_json(scope):
                await self._resolved(scope, receive, send)
            case _:
                await self.app(scope, receive, send)

    async def _resolved(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the version that its name points to."""
        chunks: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        # No await from here until the request is counted.
        body = b"".join(chunks)
        name, fields = named(body)
        version = self._names().get(name, name) if name is not None else None
        if name is not None and version is None:
            return await answer(send, 503, loading_answer(name), (b"retry-after", b"1"))
        if version != name:
            body = renamed(fields, version)
            scope = {**scope, "headers": with_length(scope["headers"], len(body))}
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body, chunks, fields, message  # maybe megabytes, and the answer may take minutes

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        if version in self.versions:
            await self._counted(version, scope, replay, send)
        else:
            await self.app(scope, replay, send)

    async def _counted(self, version: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, count it, and name the version in the response headers."""
        count, begun, status, ended = self.versions[version], time.monotonic(), 0, False
        count.in_flight += 1
        count.requests += 1

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                count.in_flight -= 1
                count.seconds += time.monotonic() - begun

        async def mark(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                count.errors += status >= 500
                header = (b"x-served-version", version.encode("ascii", "backslashreplace"))
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                end()  # the client has its answer; what the app still does is not counted

        try:
            await self.app(scope, receive, mark)
        except Exception:
            count.errors += status < 500  # a 5xx has been counted already
            raise
        finally:
            end()

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add public names to vLLM's list of models."""
        messages: list[Message] = []

        async def hold(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, hold)
        for message in with_names(messages, self._names()):
            await send(message)

    def _names(self) -> dict[str, str | None]:
        """The current public names. The requests to each of their versions are counted from now on."""
        self.file.refresh()
        for version in self.file.names.values():
            if version is not None and version not in self.versions:
                self.versions[version] = Count()
        return self.file.names


def state(found: os.stat_result) -> tuple[int, ...]:
    """Changes when a file is replaced or written to."""
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def has_json(scope: Scope) -> bool:
    """Whether vLLM may parse the body as JSON, judging by the request's content type."""
    kinds = [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == b"content-type"]
    kinds = [kind.partition(";")[0].strip().lower() for kind in kinds]
    return any(kind == "application/json" or kind.endswith("+json") for kind in kinds)


def named(body: bytes) -> tuple[str | None, dict[str, Any]]:
    """The `model` of a request (None if it has none), and its fields. The last of equal fields counts, as in vLLM."""
    fields: Any
    try:
        fields = FIELDS.decode(body)
        return msgspec.json.decode(fields["model"], type=str), fields
    except (KeyError, msgspec.ValidationError):  # no model, or not a string, or the body is not an object
        return None, {}
    except (ValueError, RecursionError):
        pass
    # vLLM's parser is laxer than msgspec: NaN, half a surrogate pair, UTF-16, a byte order mark.
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None, {}
    name = fields.get("model") if isinstance(fields, dict) else None
    return (name, fields) if isinstance(name, str) else (None, {})


def renamed(fields: dict[str, Any], version: str | None) -> bytes:
    """The body of a request, with the version as its model."""
    fields, skipped = fields | {"model": version}, isinstance(fields["model"], msgspec.Raw)
    return msgspec.json.encode(fields) if skipped else json.dumps(fields).encode()


def with_names(messages: list[Message], names: dict[str, str | None]) -> list[Message]:
    """The messages of vLLM's list of models, with the public names added; unchanged if they can't be parsed."""
    try:
        start, *bodies = messages
        if start["status"] != 200 or any(message["type"] != "http.response.body" for message in bodies):
            return messages
        listed = msgspec.json.decode(b"".join(message.get("body", b"") for message in bodies))
        cards = {card["id"]: card for card in listed["data"]}
        added = {name: version for name, version in names.items() if version in cards and name not in cards}
        listed["data"] += [{**cards[version], "id": name, "root": version} for name, version in added.items()]
    except (ValueError, TypeError, LookupError):
        return messages
    body = msgspec.json.encode(listed)
    start = {**start, "headers": with_length(start.get("headers", ()), len(body))}
    return [start, {"type": "http.response.body", "body": body}]


def with_length(headers: Iterable[Header], length: int) -> list[Header]:
    """The headers with another content length."""
    kept = [(key, value) for key, value in headers if key.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


def loading_answer(name: str) -> dict[str, Any]:
    """The error for a model that is being loaded, in the format of the OpenAI API."""
    message = f"The model `{name}` is being loaded; try again in a moment."
    return {"error": {"message": message, "type": "ServiceUnavailableError", "param": "model", "code": 503}}


async def answer(send: Send, status: int, value: Any, *more: Header) -> None:
    """Send a JSON response, with additional headers."""
    body = msgspec.json.encode(value)
    headers = with_length([(b"content-type", b"application/json"), *more], len(body))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
