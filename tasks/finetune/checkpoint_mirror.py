"""Copies of checkpoints in a bucket, from which a run goes on that was sent to another machine."""

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
        self._copies: list[tuple[Future[None], list[Path]]] = []  # the one being made, and the one to be made next

    def newest(self) -> int | None:
        """The latest step that there is a whole copy of."""
        with connect(f"checkpoints {self.uri}", self.settings) as client:
            return max(self._whole(client), default=None)

    def download(self, directory: Path) -> None:
        """Copy a step's checkpoint to its directory, which is not there yet, whole or not at all."""
        partial = directory.with_name(f"{directory.name}.partial")
        with connect(f"checkpoints {self.uri}", self.settings) as client:
            if int(directory.name) not in self._whole(client):
                raise ForgeError(
                    f"checkpoints {self.uri}: there is no whole copy of {directory.name}, which a later one needs; put "
                    f"it into {directory}, or remove the copies and {directory.parent}, and training begins anew"
                )
            prefix = f"{self.prefix}/{directory.name}/"
            files = self._files(client, prefix)
            paths = [partial / file.name.removeprefix(prefix) for file in files]
            download(client, self.bucket, list(zip(files, paths, strict=True)), lambda done: None)
        os.rename(partial, directory)

    def copy(self, directories: list[Path], kept: set[str]) -> None:
        """Have the checkpoints copied that have no copy yet, and then the copies of steps removed that are not kept.

        Training does not wait for it. While an earlier call's are being copied, those of the last call come next.
        """
        self._give_way()
        copying = self._pool.submit(self._told, lambda: self._copy(directories, kept))
        self._copies.append((copying, directories))

    def needed(self) -> set[Path]:
        """Directories that are being copied, or are to be."""
        return {directory for copying, directories in self._copies if not copying.done() for directory in directories}

    def wait(self) -> None:
        """Until what is to be copied is there. What cannot be copied is told, and ends nothing: training goes on."""
        for copying, _ in self._copies:
            copying.result()

    def remove(self) -> None:
        """All copies: the job is done."""
        self._give_way()
        self.wait()
        self._told(lambda: self._remove(lambda step: True))
        self._pool.shutdown()

    def _give_way(self) -> None:
        """Forget what was copied, and what was to be but has not begun."""
        self._copies = [one for one in self._copies if not (one[0].cancel() or one[0].done())]

    def _copy(self, directories: list[Path], kept: set[str]) -> None:
        with connect(f"checkpoints {self.uri}", self.settings, SENDING) as client:
            whole = self._whole(client)
            for directory in directories:
                if int(directory.name) in whole:
                    continue
                files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != FACTS]
                for path in [*files, directory / FACTS]:
                    name = f"{self.prefix}/{directory.name}/{path.relative_to(directory)}"
                    client.fput_object(self.bucket, name, str(path), part_size=PART)
        self._remove(lambda step: step not in kept)

    def _remove(self, wanted: Callable[[str], bool]) -> None:
        with connect(f"checkpoints {self.uri}", self.settings) as client:
            names = [file.name for file in self._files(client, f"{self.prefix}/")]
            # What makes a copy count goes first.
            for name in sorted(names, key=lambda name: not name.endswith(f"/{FACTS}")):
                if wanted(name.removeprefix(f"{self.prefix}/").split("/")[0]):
                    client.remove_object(self.bucket, name)

    def _whole(self, client: "Minio") -> set[int]:
        """The steps that there are whole copies of."""
        files = self._files(client, f"{self.prefix}/")
        names = [file.name.removeprefix(f"{self.prefix}/").split("/") for file in files]
        return {int(name[0]) for name in names if name[1:] == [FACTS]}

    def _files(self, client: "Minio", prefix: str) -> list[File]:
        found = client.list_objects(self.bucket, prefix=prefix, recursive=True)
        return [File(item.object_name or "", item.size or 0, item.etag or "") for item in found]

    def _told(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, it ends nothing
            message = error.message if isinstance(error, ForgeError) else f"checkpoints {self.uri}: {error!r}"
            log.warning(message)
