"""One way to publish or fetch a package, timed in its own process: python -m benchmarks.register.side '{...}'."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minio import Minio
from pydantic import SecretStr

from forge.core.settings import Settings
from forge.registry.packages import fetch_package
from forge.storage import open_store
from tasks.register.publish import build_package

CHUNK = 1 << 20  # bytes
FACTS = {
    "kind": "model", "name": "bench", "model_digest": "", "base": {"location": "random bytes"}, "dataset": "",
    "recipe": "", "evaluation": "", "verdict": "", "metrics": {}, "versions": {}, "made_by": "benchmark",
}  # fmt: skip


def main() -> None:
    """Time the way in the arguments, without imports, and write the seconds to result.json."""
    arguments = json.loads(sys.argv[1])
    ways = {"push": push, "fetch": fetch, "plain_push": plain_push, "plain_fetch": plain_fetch, "copy": copy}
    prepared = ways[arguments["way"]](arguments)
    started = time.perf_counter()
    found = prepared()
    result = {"seconds": time.perf_counter() - started, "found": found}
    (Path(arguments["folder"]) / "result.json").write_text(json.dumps(result))


def settings_of(arguments: dict[str, Any]) -> Settings:
    """Settings of a machine whose local copies are in `home`."""
    return Settings(
        home=Path(arguments["home"]),
        store=f"s3://{arguments['bucket']}/forge-{arguments['round']}",
        s3_endpoint=arguments["endpoint"],
        s3_access_key=SecretStr(arguments["keys"][0]),
        s3_secret_key=SecretStr(arguments["keys"][1]),
    )


def client_of(arguments: dict[str, Any]) -> Minio:
    """The plain minio client."""
    return Minio(arguments["endpoint"].removeprefix("http://"), *arguments["keys"], secure=False)


def push(arguments: dict[str, Any]) -> Callable[[], str]:
    """Forge: hash all files, write the model card and manifest, upload, verify, and read the manifest back."""
    settings = settings_of(arguments)
    store = open_store(settings)
    return lambda: build_package(Path(arguments["model"]), FACTS, settings, store)[0]


def fetch(arguments: dict[str, Any]) -> Callable[[], str]:
    """Forge: fetch to the local copies, and compare every file with the manifest."""
    settings = settings_of(arguments)
    store = open_store(settings)
    return lambda: str(fetch_package(arguments["uri"], settings, store))


def plain_push(arguments: dict[str, Any]) -> Callable[[], str]:
    """fput_object for each file."""
    client, bucket, prefix = client_of(arguments), arguments["bucket"], f"plain-{arguments['round']}"

    def run() -> str:
        for path in sorted(Path(arguments["model"]).iterdir()):
            client.fput_object(bucket, f"{prefix}/{path.name}", str(path))
        return prefix

    return run


def plain_fetch(arguments: dict[str, Any]) -> Callable[[], str]:
    """fget_object for each file."""
    client, bucket, prefix = client_of(arguments), arguments["bucket"], f"plain-{arguments['round']}"

    def run() -> str:
        for path in sorted(Path(arguments["model"]).iterdir()):
            client.fget_object(bucket, f"{prefix}/{path.name}", str(Path(arguments["home"]) / path.name))
        return arguments["home"]

    return run


def copy(arguments: dict[str, Any]) -> Callable[[], str]:
    """The upper limit, without a server: read, hash and write each file."""
    target = Path(arguments["home"])

    def run() -> str:
        target.mkdir()
        for path in sorted(Path(arguments["model"]).iterdir()):
            digest = hashlib.sha256()
            with path.open("rb") as source, (target / path.name).open("wb") as copied:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    copied.write(chunk)
        return str(target)

    return run


if __name__ == "__main__":
    main()
