"""A progress bar for large transfers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

LARGE = 200_000_000  # bytes; less is transferred before anyone looks


@contextlib.contextmanager
def show_progress(title: str, size: int) -> Iterator[Callable[[int], Any]]:
    """Show a bar while `size` bytes are transferred. Yields a function to call with the bytes of each step."""
    if size < LARGE:
        yield lambda done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()) as progress:
        bar = progress.add_task(title[:60], total=size)
        yield lambda done: progress.advance(bar, done)
