"""Logs: each line has its level, its run and its stage. People read lines, and Flyte's collectors JSON.

Modules log to `logging.getLogger(__name__)`. What starts a process calls `start_logging` once for each stage it runs.
"""

import logging
import os
import secrets
import sys
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter
from rich.text import Text

EXECUTION = "FLYTE_INTERNAL_EXECUTION_ID"  # set in Flyte's pods
RUN_ID = "FORGE_RUN_ID"  # of a run on one machine: set here, and inherited by the processes that it starts
LOGGERS = ("forge", "tasks")
STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


def start_logging(stage: str) -> None:
    """Write what Forge's modules log to stdout, as lines of this stage."""
    handler = _Stdout()
    handler.addFilter(_Context(stage, run_id()))
    handler.setFormatter(_json() if EXECUTION in os.environ else _Lines())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]


def run_id() -> str:
    """The Flyte execution, or the ID of this run on one machine."""
    return os.environ.get(EXECUTION) or os.environ.setdefault(RUN_ID, secrets.token_hex(4))


class _Context(logging.Filter):
    """Adds the run and the stage to each record."""

    def __init__(self, stage: str, run: str) -> None:
        super().__init__()
        self.stage, self.run = stage, run

    def filter(self, record: logging.LogRecord) -> bool:
        record.stage, record.run = self.stage, self.run
        return True


class _Stdout(logging.StreamHandler[TextIO]):
    """Writes to what sys.stdout is at the time: a progress bar takes its place, and draws itself below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """Where to write."""
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is sys.stdout")


class _Lines(logging.Formatter):
    """`stage: message` on a terminal; elsewhere with the time, the level and the run before it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(run)s] %(stage)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if not sys.stdout.isatty():
            return super().format(record)
        line = f"{record.stage}: {record.getMessage()}"  # type: ignore[attr-defined]
        style = STYLES.get(record.levelno)
        return _coloured(line, style) if style else line


def _coloured(line: str, style: str) -> str:
    from rich.console import Console

    console = Console(force_terminal=True)
    with console.capture() as capture:
        console.print(Text(line, style), soft_wrap=True, end="")
    return capture.get()


def _json() -> logging.Formatter:
    names = {"asctime": "time", "levelname": "level", "name": "logger"}
    return JsonFormatter("%(asctime)s %(levelname)s %(run)s %(stage)s %(name)s %(message)s", rename_fields=names)
