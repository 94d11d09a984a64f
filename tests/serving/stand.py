"""A fake vLLM with its middleware, for tests where the real one is slow or can't be made to fail."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from forge.core.contracts import Engine
from forge.serving.desired import Failed, Served


class Stand:
    """The fake's HTTP server, which reads the names file, and the Server that the reconciler starts."""

    def __init__(self, names_file: Path) -> None:
        self.names_file = names_file
        self.base = ""
        self.adapters: list[str] = []
        self.in_flight: dict[str, int] = {}
        self.refuses: set[str] = set()
        self.silent = False
        self.nonsense = False
        self.waiting = ""
        self.ensured: list[tuple[Served, str]] = []
        self.asked: Callable[[], None] = lambda: None  # called for each chat completion
        stand = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if stand.silent:
                    self.close_connection = True
                    return
                names = stand.names()
                versions = {name: {"in_flight": count} for name, count in stand.in_flight.items()}
                pages = {
                    "/v1/models": {"data": [{"id": name} for name in [stand.base, *stand.adapters]]},
                    "/served": {"names": names, "versions": versions},
                    "/metrics": "",
                }
                self._send(200, {"hello": "world"} if stand.nonsense else pages[self.path])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if "chat" in self.path:
                    stand.asked()
                    version = stand.names().get(body["model"], body["model"])
                    message = {"role": "assistant", "content": f"I am {version}"}
                    self._send(200, {"model": version, "choices": [{"index": 0, "message": message}]})
                    return
                adapter = body["lora_name"]
                if adapter in stand.refuses:
                    self._send(400, {"error": {"message": "no such rank"}})
                    return
                if "unload" in self.path:
                    stand.adapters.remove(adapter)
                else:
                    stand.adapters.append(adapter)
                self._send(200, {})

            def _send(self, status: int, value: object) -> None:
                body = json.dumps(value).encode() if value != "" else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()  # seconds until shutdown()

    def names(self) -> dict[str, str]:
        """The public names and the versions that they point to."""
        return json.loads(self.names_file.read_text())["names"] if self.names_file.exists() else {}

    def ensure(self, base: Served, path: str, engine: Engine) -> str:
        self.ensured.append((base, path))
        if base.versioned in self.refuses:
            raise Failed("it exits immediately")
        if not self.waiting and self.base != base.versioned:
            self.base, self.adapters = base.versioned, []
        return self.waiting

    def stop(self) -> None:
        self.base, self.adapters = "", []
