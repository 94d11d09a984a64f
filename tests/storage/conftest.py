"""Servers of every kind, and a bucket of its own for each test."""

import hashlib
import os
from pathlib import Path

import pytest

from tests.storage.place import Place
from tests.storage.servers import MAKES, shared_server


@pytest.fixture(params=MAKES)
def server(request: pytest.FixtureRequest) -> str:
    """URL of an S3 server of each kind."""
    return shared_server(request.param)


@pytest.fixture
def bucket_name(request: pytest.FixtureRequest) -> str:
    """The name of a bucket that no other test uses."""
    test = f"{request.node.nodeid} {os.getpid()}"
    return f"bucket-{hashlib.sha256(test.encode()).hexdigest()[:16]}"


@pytest.fixture
def place(server: str, bucket_name: str, tmp_path: Path) -> Place:
    """An empty bucket on a server of each kind."""
    return Place(server, bucket_name, tmp_path)
