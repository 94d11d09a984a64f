"""Progress of a training run: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds, where the output is no terminal


class TrainingProgress:
    """Shows step, loss, tokens a second and time left. Silent when `shown` is false (every rank but the first)."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.steps, self.shown = steps, shown
        self.started = self._last = time.monotonic()
        self._bar: Progress | None = None
        if shown and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(file=sys.stdout),
            )
            self._task = self._bar.add_task("train", total=steps, figures="")

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Tell how far it is: steps done, loss of the last ones (nats a trained token), tokens so far."""
        if not self.shown:
            return
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        figures = f"loss {loss:.4f}  {tokens / elapsed:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif now - self._last >= LINE_EVERY or step == self.steps:
            self._last = now
            left = elapsed / step * (self.steps - step)
            print(f"train: step {step:,}/{self.steps:,}  {figures}  {left:.0f} s left", flush=True)
