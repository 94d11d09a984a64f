"""Copies of checkpoints in a bucket, from which a run goes on that was sent to another machine."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tasks.errors import ForgeError
from tasks.settings import Settings
from tasks.storage.remote import connect, split

FACTS = "facts.json"  # what the training loop knows beside weights and optimizer
PART = 64 << 20  # bytes; a file may have 10,000 parts


class Bucket:
    """One job's checkpoints under an S3 URI. A copy counts when it has its facts, which are written last.

    The job's key is part of the URI, so a retry finds them whatever execution made them, and nothing else need point
    to them.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        self.uri, self.settings = uri, settings
        self.bucket, self.prefix = split(uri)
        self._pool = ThreadPoolExecutor(1, "checkpoint-copy")
        self._copying: Future[None] | None = None

    def newest(self) -> int | None:
        """The latest step that there is a whole copy of."""
        with connect(f"checkpoints {self.uri}", self.settings) as client:
            found = client.list_objects(self.bucket, prefix=f"{self.prefix}/", recursive=True)
            names = [(item.object_name or "").removeprefix(f"{self.prefix}/").split("/") for item in found]
        return max((int(name[0]) for name in names if name[1:] == [FACTS]), default=None)

    def download(self, step: str, directory: Path) -> None:
        """Copy a step's checkpoint to a directory that is not there yet, whole or not at all."""
        partial = directory.with_name(f"{directory.name}.partial")
        with connect(f"checkpoints {self.uri}", self.settings) as client:
            prefix = f"{self.prefix}/{step}/"
            for item in client.list_objects(self.bucket, prefix=prefix, recursive=True):
                name = item.object_name or ""
                client.fget_object(self.bucket, name, str(partial / name.removeprefix(prefix)))
        os.rename(partial, directory)

    def copy(self, directory: Path, kept: set[str]) -> None:
        """Begin to copy a checkpoint, and then to remove the copies of steps that are not among the kept ones."""
        self.wait()
        self._copying = self._pool.submit(self._copy, directory, kept)

    def _copy(self, directory: Path, kept: set[str]) -> None:
        with connect(f"checkpoints {self.uri}", self.settings) as client:
            files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != FACTS]
            for path in [*files, directory / FACTS]:
                name = f"{self.prefix}/{directory.name}/{path.relative_to(directory)}"
                client.fput_object(self.bucket, name, str(path), part_size=PART)
        self._remove(lambda step: step not in kept)

    def wait(self) -> None:
        """Until what is being copied is there. What cannot be copied is told, and ends nothing: training goes on."""
        if self._copying is None:
            return
        copying, self._copying = self._copying, None
        self._told(copying.result)

    def remove(self) -> None:
        """All copies: the job is done."""
        self.wait()
        self._told(lambda: self._remove(lambda step: True))
        self._pool.shutdown()

    def _remove(self, wanted: Callable[[str], bool]) -> None:
        with connect(f"checkpoints {self.uri}", self.settings) as client:
            found = list(client.list_objects(self.bucket, prefix=f"{self.prefix}/", recursive=True))
            names = [item.object_name or "" for item in found]
            # What makes a copy count goes first.
            for name in sorted(names, key=lambda name: not name.endswith(f"/{FACTS}")):
                if wanted(name.removeprefix(f"{self.prefix}/").split("/")[0]):
                    client.remove_object(self.bucket, name)

    def _told(self, action: Callable[[], None]) -> None:
        try:
            action()
        except ForgeError as error:
            print(f"train: {error.message}", file=sys.stderr, flush=True)
