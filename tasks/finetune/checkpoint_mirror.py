"""Copies of checkpoints in a bucket, so that a run can resume on another machine."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.storage.s3 import SENDING, connect, split
from forge.storage.transfer import File, download

if TYPE_CHECKING:
    from minio import Minio

log = logging.getLogger(__name__)

STATE = "facts.json"  # the training loop's state; the name is part of the checkpoint format
PART = 64 << 20  # bytes; S3 allows 10,000 parts per file


class CheckpointMirror:
    """Copies of one job's checkpoints under an S3 URI. A copy is complete once it has its STATE, which is sent last.

    The URI contains the job's key, so a retry finds the copies whatever execution made them.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        self.uri, self.settings = uri, settings
        self.bucket, self.prefix = split(uri)
        self._pool = ThreadPoolExecutor(1, "checkpoint-copy")
        self._copies: list[tuple[Future[None], list[Path]]] = []  # the running copy, and the next one

    def latest(self) -> int | None:
        """The latest step with a complete copy."""
        with connect(self._where, self.settings) as client:
            return max(self._complete_steps(client), default=None)

    def download(self, directory: Path) -> None:
        """Download a step's checkpoint to its directory, which must not exist; all of it or nothing.

        Raises ForgeError if there is no complete copy.
        """
        partial = directory.with_name(f"{directory.name}.partial")
        with connect(self._where, self.settings) as client:
            if int(directory.name) not in self._complete_steps(client):
                raise ForgeError(
                    f"there is no complete copy of {directory.name}, which a later checkpoint needs",
                    where=self._where,
                    fix=f"put it into {directory}, or remove the copies and {directory.parent} to start again",
                )
            prefix = f"{self.prefix}/{directory.name}/"
            files = self._files(client, prefix)
            paths = [partial / file.name.removeprefix(prefix) for file in files]
            download(client, self.bucket, list(zip(files, paths, strict=True)), lambda done: None)
        os.rename(partial, directory)

    def copy(self, directories: list[Path], kept: set[str]) -> None:
        """Start to copy the checkpoints that have no copy yet, and then remove the copies of steps not in `kept`.

        Training does not wait. If an earlier copy is still running, this one follows it, in place of any other.
        """
        self._cancel_pending()
        copying = self._pool.submit(self._warn_on_error, lambda: self._copy(directories, kept))
        self._copies.append((copying, directories))

    def in_use(self) -> set[Path]:
        """Directories that are being copied or will be."""
        return {directory for copying, directories in self._copies if not copying.done() for directory in directories}

    def wait(self) -> None:
        """Wait for all copies. A failed copy is logged, and training continues without it."""
        for copying, _ in self._copies:
            copying.result()

    def remove(self) -> None:
        """Remove all copies, when the job is done."""
        self._cancel_pending()
        self.wait()
        self._warn_on_error(lambda: self._remove(lambda step: True))
        self._pool.shutdown()

    @property
    def _where(self) -> str:
        return f"checkpoints {self.uri}"

    def _cancel_pending(self) -> None:
        """Forget finished copies, and cancel the one that has not started."""
        self._copies = [copy for copy in self._copies if not (copy[0].cancel() or copy[0].done())]

    def _copy(self, directories: list[Path], kept: set[str]) -> None:
        with connect(self._where, self.settings, SENDING) as client:
            complete = self._complete_steps(client)
            for directory in directories:
                if int(directory.name) in complete:
                    continue
                files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != STATE]
                for path in [*files, directory / STATE]:
                    name = f"{self.prefix}/{directory.name}/{path.relative_to(directory)}"
                    client.fput_object(self.bucket, name, str(path), part_size=PART)
        self._remove(lambda step: step not in kept)

    def _remove(self, condition: Callable[[str], bool]) -> None:
        """Remove the copies of the steps that fulfil a condition."""
        with connect(self._where, self.settings) as client:
            names = [file.name for file in self._files(client, f"{self.prefix}/")]
            # STATE first: without it a copy is incomplete.
            for name in sorted(names, key=lambda name: not name.endswith(f"/{STATE}")):
                if condition(name.removeprefix(f"{self.prefix}/").split("/")[0]):
                    client.remove_object(self.bucket, name)

    def _complete_steps(self, client: "Minio") -> set[int]:
        files = self._files(client, f"{self.prefix}/")
        names = [file.name.removeprefix(f"{self.prefix}/").split("/") for file in files]
        return {int(name[0]) for name in names if name[1:] == [STATE]}

    def _files(self, client: "Minio", prefix: str) -> list[File]:
        objects = client.list_objects(self.bucket, prefix=prefix, recursive=True)
        return [File(item.object_name or "", item.size or 0, item.etag or "") for item in objects]

    def _warn_on_error(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # no failed copy may stop training
            log.warning(error.message if isinstance(error, ForgeError) else f"{self._where}: {error!r}")
