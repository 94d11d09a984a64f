"""`python -m benchmarks.rollout.names`: the latency that public names add to a request."""

import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from forge.serving.aliases import App, Message, PublicNames, Receive, Scope, Send

TURN = "On which date did the council meet, and who was there? "
BODY = json.dumps(
    {
        "model": "dates",
        "messages": [{"role": role, "content": TURN * 9} for role in ("system", "user", "assistant", "user")],
        "temperature": 0.2,
        "max_tokens": 256,
    }
).encode()  # 2 KB
SCOPE: Scope = {
    "type": "http",
    "method": "POST",
    "path": "/v1/chat/completions",
    "headers": [
        (b"host", b"127.0.0.1:8000"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(BODY)).encode()),
        (b"authorization", b"Bearer none"),
    ],
}


async def trivial(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that reads a request and sends an empty response."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def timed(app: App) -> float:
    """Seconds for one request."""

    async def receive() -> Message:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Message) -> None:
        pass

    started = time.perf_counter()
    await app(dict(SCOPE), receive, send)
    return time.perf_counter() - started


async def difference(requests: int) -> float:
    """Seconds that the middleware adds to a request. The two sides take turns, so that both see the same load."""
    sides: dict[str, App] = {"without": trivial, "with": PublicNames(trivial)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(requests):
        for side, app in sides.items():
            seconds[side].append(await timed(app))
    return statistics.median(seconds["with"]) - statistics.median(seconds["without"])


def cost(requests: int = 2000) -> float:
    """Milliseconds that public names add to a chat request of 2 KB: the difference of the medians."""
    before = os.environ.get("SERVED_NAMES")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "names.json"
        file.write_text(json.dumps({"names": {"dates": "dates-0123456789ab"}}))
        os.environ["SERVED_NAMES"] = str(file)
        try:
            return asyncio.run(difference(requests)) * 1000
        finally:
            if before is None:
                del os.environ["SERVED_NAMES"]
            else:
                os.environ["SERVED_NAMES"] = before


if __name__ == "__main__":
    print(f"{cost():.4f} ms per request")
