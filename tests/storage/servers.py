"""S3 servers of two kinds on loopback: moto, which honours conditional writes, and rclone, which ignores them."""

import atexit
import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minio import Minio
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from forge.core.settings import Settings

# The URL of another server to test against, such as MinIO. The tests create buckets there and don't delete them.
GIVEN = os.environ.get("FORGE_TEST_S3_ENDPOINT", "")
KEY = os.environ.get("FORGE_TEST_S3_ACCESS_KEY", "someone")
SECRET = os.environ.get("FORGE_TEST_S3_SECRET_KEY", "secret-of-someone")
MAKES = ("moto", "rclone", *(["given"] if GIVEN else []))
RCLONE = shutil.which("rclone", path=str(Path(sys.executable).parent)) or ""


def settings_of(endpoint: str, **more: object) -> Settings:
    """Settings of a user of a server."""
    return Settings(s3_endpoint=endpoint, s3_access_key=SecretStr(KEY), s3_secret_key=SecretStr(SECRET), **more)


def client_of(endpoint: str) -> Minio:
    """A plain minio client of a server."""
    return Minio(endpoint.removeprefix("http://"), KEY, SECRET, secure=False)


@functools.cache
def shared_server(make: str) -> str:
    """The URL of a server of this kind, started once per test run. Each test creates buckets of its own on it."""
    if make == "given":
        return GIVEN
    running = contextlib.ExitStack()
    atexit.register(running.close)
    if make == "moto":
        return running.enter_context(moto())
    directory = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="forge-rclone-")))
    return running.enter_context(rclone(directory))


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """URL of moto, in this process. All moto servers of a process have the same buckets."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@contextlib.contextmanager
def rclone(
    directory: Path,
    certificate: tuple[Path, Path] | None = None,
    users: dict[str, str] | None = None,
    read_only: bool = False,
) -> Iterator[str]:
    """URL of rclone, which serves a directory; over TLS if a certificate and its key are given.

    `users` maps access keys to secret keys.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    command = [RCLONE, "serve", "s3", str(directory), "--addr", address, *(["--read-only"] if read_only else [])]
    for key, secret in (users or {KEY: SECRET}).items():
        command += ["--auth-key", f"{key},{secret}"]
    if certificate is not None:
        command += ["--cert", str(certificate[0]), "--key", str(certificate[1])]
    environment = os.environ | {"RCLONE_CONFIG": "/dev/null"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield f"{'http' if certificate is None else 'https'}://{address}"
    finally:
        process.kill()
        process.wait()
