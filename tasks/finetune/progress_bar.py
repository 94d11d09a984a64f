"""Progress of a training run: a bar on a terminal, otherwise a line every few seconds."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tasks.finetune.train_state import TrainState

log = logging.getLogger(__name__)

LINE_EVERY = 10.0  # seconds, if the output is not a terminal


class TrainingProgress:
    """Shows step, loss, tokens per second and time left, if `shown` (on the first rank)."""

    def __init__(self, steps: int, state: TrainState, shown: bool) -> None:
        self.steps, self.shown = steps, shown
        self._last = time.monotonic()
        self._start = state.step, state.tokens, state.seconds
        self._bar: Progress | None = None
        if shown and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeRemainingColumn(),
                console=Console(file=sys.stdout),
            )
            self._task = self._bar.add_task("train", total=steps, metrics="")

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, state: TrainState) -> None:
        """Show the progress so far."""
        if not self.shown:
            return
        step, tokens, seconds = self._start
        elapsed = max(state.seconds - seconds, 1e-9)
        loss = f"loss {state.curve[-1]['loss']:.4f}  " if state.curve else ""
        skipped = f"  {len(state.skipped)} skipped" if state.skipped else ""
        metrics = f"{loss}{(state.tokens - tokens) / elapsed:,.0f} tokens/s{skipped}"
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=state.step, metrics=metrics)
        elif now - self._last >= LINE_EVERY or state.step == self.steps:
            self._last = now
            left = elapsed / (state.step - step) * (self.steps - state.step)
            log.info(f"step {state.step:,}/{self.steps:,}  {metrics}  {left:.0f} s left")
