"""Public names: `vllm --middleware forge.serving.aliases.PublicNames` answers for them by what they lead to right now.

It runs within vLLM and its environment, of whose packages it needs msgspec alone, and imports nothing of this project.
vLLM itself knows versioned names only. The reconciler writes where public names lead into the file $SERVED_NAMES:
`{"names": {"dates": "dates-0123456789ab"}}`, or null for a name whose model is still being loaded. A request is
resolved once, when its body has arrived, and counted under its version in the same step. So who has replaced the file
and finds the new names in GET /served knows that nothing leads to the old version any more, and that it is at rest as
soon as its in_flight is 0. Counts are of this process: vLLM is to run one API server.
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
    """What is in the file."""

    names: dict[str, str | None]


class Count(msgspec.Struct):
    """What became of a version's requests: `seconds` is the sum of those that have ended, from body to last byte."""

    in_flight: int = 0
    requests: int = 0
    errors: int = 0
    seconds: float = 0.0


FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])  # the values are skipped, not parsed
CONTENT = msgspec.json.Decoder(Content)


class NamesFile:
    """The file of public names, read again when it has been replaced."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.names: dict[str, str | None] = {}
        self._state: tuple[int, ...] = ()
        self._file: BinaryIO | None = None
        self._trouble = ""

    def refresh(self) -> None:
        """Bring `names` up to date: none where there is no file, the last good ones where it cannot be read."""
        try:
            if state(os.stat(self.path)) == self._state:
                return
            file = open(self.path, "rb")  # noqa: SIM115
        except (FileNotFoundError, NotADirectoryError):
            self._keep(None, ())
            self.names = {}
            return
        except OSError as error:  # such as too many open files: the next request tries again
            self._warn(str(error))
            return
        # Kept open: the number of an open file's inode is not given to the file that replaces it.
        self._keep(file, state(os.fstat(file.fileno())))
        try:
            self.names, self._trouble = CONTENT.decode(file.read()).names, ""
        except (OSError, ValueError) as error:
            self._warn(str(error))

    def _keep(self, file: BinaryIO | None, new: tuple[int, ...]) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._state = file, new

    def _warn(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning("%s: %s; public names stay as they were", self.path, trouble)
        self._trouble = trouble


class PublicNames:
    """The middleware (ASGI)."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.file = NamesFile(os.environ.get("SERVED_NAMES", ""))
        self.versions: dict[str, Count] = {}  # only those that public names have led to: clients cannot add any

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or have vLLM answer."""
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
        """Have a request answered by the version that its name leads to."""
        chunks: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        # From here to the count nothing is awaited.
        body = b"".join(chunks)
        name, fields = named(body)
        version = self._names().get(name, name) if name is not None else None
        if name is not None and version is None:
            return await answer(send, 503, loading_answer(name), (b"retry-after", b"1"))
        if version != name:
            body = renamed(fields, version)
            scope = {**scope, "headers": with_length(scope["headers"], len(body))}
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body, chunks, fields, message  # megabytes, maybe, and the answer may take minutes

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        if version in self.versions:
            await self._counted(version, scope, replay, send)
        else:
            await self.app(scope, replay, send)

    async def _counted(self, version: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered, count it, and say in the answer by which version it is."""
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
                end()  # what the app does after the last byte keeps nobody waiting

        try:
            await self.app(scope, receive, mark)
        except Exception:
            count.errors += status < 500  # others are counted
            raise
        finally:
            end()

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add public names to vLLM's list of models."""
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        await self.app(scope, receive, hold)
        for message in with_names(held, self._names()):
            await send(message)

    def _names(self) -> dict[str, str | None]:
        """Where public names lead at this moment. Each version among them is counted from now on."""
        self.file.refresh()
        for version in self.file.names.values():
            if version is not None and version not in self.versions:
                self.versions[version] = Count()
        return self.file.names


def state(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced, or written to."""
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def has_json(scope: Scope) -> bool:
    """Whether vLLM, by the request's content-type, could take its body as JSON."""
    kinds = [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == b"content-type"]
    kinds = [kind.partition(";")[0].strip().lower() for kind in kinds]
    return any(kind == "application/json" or kind.endswith("+json") for kind in kinds)


def named(body: bytes) -> tuple[str | None, dict[str, Any]]:
    """The `model` of a request (None if it has none) and its fields, the last of equal names, as vLLM takes them."""
    fields: Any
    try:
        fields = FIELDS.decode(body)
        return msgspec.json.decode(fields["model"], type=str), fields
    except (KeyError, msgspec.ValidationError):  # has none, or it is no string, or the body is no object
        return None, {}
    except (ValueError, RecursionError):
        pass
    # vLLM's parser takes what is no JSON to msgspec: NaN, half of a surrogate pair, UTF-16, a byte order mark.
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None, {}
    name = fields.get("model") if isinstance(fields, dict) else None
    return (name, fields) if isinstance(name, str) else (None, {})


def renamed(fields: dict[str, Any], version: str | None) -> bytes:
    """The body of a request for a version."""
    fields, skipped = fields | {"model": version}, isinstance(fields["model"], msgspec.Raw)
    return msgspec.json.encode(fields) if skipped else json.dumps(fields).encode()


def with_names(held: list[Message], names: dict[str, str | None]) -> list[Message]:
    """The messages of vLLM's list of models, with public names beside the versions; as they are, if unexpected."""
    try:
        start, *bodies = held
        if start["status"] != 200 or any(message["type"] != "http.response.body" for message in bodies):
            return held
        listed = msgspec.json.decode(b"".join(message.get("body", b"") for message in bodies))
        cards = {card["id"]: card for card in listed["data"]}
        led = {name: version for name, version in names.items() if version in cards and name not in cards}
        listed["data"] += [{**cards[version], "id": name, "root": version} for name, version in led.items()]
    except (ValueError, TypeError, LookupError):
        return held
    body = msgspec.json.encode(listed)
    start = {**start, "headers": with_length(start.get("headers", ()), len(body))}
    return [start, {"type": "http.response.body", "body": body}]


def with_length(headers: Iterable[Header], length: int) -> list[Header]:
    """The headers for a body of another length."""
    kept = [(key, value) for key, value in headers if key.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


def loading_answer(name: str) -> dict[str, Any]:
    """An error as the OpenAI API has them."""
    message = f"The model `{name}` is being loaded; try again in a moment."
    return {"error": {"message": message, "type": "ServiceUnavailableError", "param": "model", "code": 503}}


async def answer(send: Send, status: int, value: Any, *more: Header) -> None:
    """Send an answer in JSON, with `more` headers."""
    body = msgspec.json.encode(value)
    headers = with_length([(b"content-type", b"application/json"), *more], len(body))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
