"""Progress of what takes long to send or to fetch."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

LARGE = 200_000_000  # bytes; less is there before anybody looks


@contextlib.contextmanager
def shown(what: str, size: int) -> Iterator[Callable[[int], Any]]:
    """Show a bar while so many bytes are moved; what is yielded is told how many more are done."""
    if size < LARGE:
        yield lambda done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()) as progress:
        bar = progress.add_task(what[:60], total=size)
        yield lambda done: progress.advance(bar, done)
