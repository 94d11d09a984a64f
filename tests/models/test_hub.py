"""Models of the Hugging Face Hub, from a server of its API on loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from forge.core.errors import ForgeError
from forge.models import hub
from forge.registry.packages import LocalBase

COMMIT = "0" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 10,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickled weights",
    "modeling.py": b"raise SystemExit",
}


class Hub(BaseHTTPRequestHandler):
    """The model owner/name, with one commit."""

    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(path)
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        siblings = [{"rfilename": file, "size": len(data)} for file, data in FILES.items()]
        if path.startswith("/api/models/owner/name/tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha256(data).hexdigest()}
                for file, data in FILES.items()
            ]
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/owner/name"):
            self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif name in FILES:
            self.answer(FILES[name])
        else:
            self.answer(b"", 404)

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if status != 200:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Hub that HF_ENDPOINT names."""
    Hub.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        thread = threading.Thread(target=running.serve_forever, args=[0.01])
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        yield
        running.shutdown()
        thread.join()


@pytest.mark.usefixtures("server")
def test_a_model_is_downloaded_without_pickled_weights_or_code() -> None:
    directory = hub.local_directory(LocalBase("owner/name", COMMIT))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: data for name, data in FILES.items() if name not in ("pytorch_model.bin", "modeling.py")
    }


@pytest.mark.usefixtures("server")
def test_size_and_configuration_are_read_without_the_weights() -> None:
    assert hub.cached_config("owner/name", COMMIT) is None
    assert hub.model_config(LocalBase("owner/name", COMMIT)) == {"model_type": "llama"}
    assert hub.weight_bytes("owner/name", COMMIT) == 70
    assert hub.cached_config("owner/name", COMMIT) is not None
    assert not any(path.endswith("safetensors") for path in Hub.requests)


@pytest.mark.usefixtures("server")
def test_a_revision_is_pinned_and_a_cached_one_needs_no_request() -> None:
    assert hub.pin_revision("owner/name", None) == COMMIT
    assert hub.pin_revision("owner/name", COMMIT) == COMMIT
    hub.model_config(LocalBase("owner/name", COMMIT))
    Hub.requests.clear()
    assert hub.pin_revision("owner/name", COMMIT) == COMMIT
    assert Hub.requests == []


def test_a_local_model_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    model = LocalBase(str(tmp_path))
    assert hub.local_directory(model) == tmp_path
    assert hub.model_config(model) == {"model_type": "llama"}


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_configuration_that_is_not_an_object_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ForgeError, match=r"its config\.json is not a JSON object; save it with save_pretrained"):
        hub.model_config(LocalBase(str(tmp_path)))


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", ["owner/another", "no/model/id", "offline"])
def test_each_function_raises_the_same_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = rf"^base model {name}: is neither a directory here nor available from the Hub \(.*\); check its name"
    model = LocalBase(name, COMMIT)
    for read in (hub.local_directory, hub.model_config):
        with pytest.raises(ForgeError, match=error):
            read(model)
    for ask in (hub.pin_revision, hub.weight_bytes):
        with pytest.raises(ForgeError, match=error):
            ask(name, COMMIT)
