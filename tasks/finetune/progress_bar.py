"""Progress of a training run: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tasks.finetune.train_state import TrainState

log = logging.getLogger(__name__)

LINE_EVERY = 10.0  # seconds, where the output is no terminal


class TrainingProgress:
    """Shows step, loss, tokens a second and time left. Silent when `shown` is false (every rank but the first)."""

    def __init__(self, steps: int, facts: TrainState, shown: bool) -> None:
        self.steps, self.shown = steps, shown
        self._last = time.monotonic()
        self._before = facts.step, facts.tokens, facts.seconds
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

    def update(self, facts: TrainState) -> None:
        """Tell how far it is."""
        if not self.shown:
            return
        step, tokens, seconds = self._before
        elapsed = max(facts.seconds - seconds, 1e-9)
        loss = f"loss {facts.curve[-1]['loss']:.4f}  " if facts.curve else ""
        skipped = f"  {len(facts.skipped)} skipped" if facts.skipped else ""
        figures = f"{loss}{(facts.tokens - tokens) / elapsed:,.0f} tokens/s{skipped}"
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=facts.step, figures=figures)
        elif now - self._last >= LINE_EVERY or facts.step == self.steps:
            self._last = now
            left = elapsed / (facts.step - step) * (self.steps - facts.step)
            log.info(f"step {facts.step:,}/{self.steps:,}  {figures}  {left:.0f} s left")
