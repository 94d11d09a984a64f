"""Logging: every line has its level, run ID and stage. Lines are for people, or JSON for the log collector in a pod.

Modules log to `logging.getLogger(__name__)`. Entry points call `start_logging` once for each stage they run.
"""

import logging
import os
import secrets
import sys
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter
from rich.text import Text

from forge.core.environment import replace_unencodable

EXECUTION = "FLYTE_INTERNAL_EXECUTION_ID"  # set in Flyte's pods
RUN_ID = "FORGE_RUN_ID"  # of a local run; set here and inherited by child processes
LOGGERS = ("forge", "tasks")
STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}
TIME = "%Y-%m-%dT%H:%M:%S%z"


def start_logging(stage: str) -> None:
    """Write what Forge's modules log to stdout, as this stage's lines. Replaces the handler of an earlier stage."""
    replace_unencodable()
    handler = _Stdout()
    handler.addFilter(_Context(stage, run_id()))
    handler.setFormatter(_json() if EXECUTION in os.environ else _Lines())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]


def run_id() -> str:
    """The Flyte execution's ID, or that of this local run."""
    return os.environ.get(EXECUTION) or os.environ.setdefault(RUN_ID, secrets.token_hex(4))


class _Context(logging.Filter):
    """Adds the run ID and the stage to each record."""

    def __init__(self, stage: str, run: str) -> None:
        super().__init__()
        self.stage, self.run = stage, run

    def filter(self, record: logging.LogRecord) -> bool:
        record.stage, record.run = self.stage, self.run
        return True


class _Stdout(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stdout: a progress bar replaces it, to draw itself below the log lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """Where to write."""
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always sys.stdout")

    def handleError(self, record: logging.LogRecord) -> None:
        """Report what is wrong with a record, but not that its line cannot be written: the disk of a log is full."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Lines(logging.Formatter):
    """`stage: message` on a terminal, coloured by level; elsewhere with time, level and run ID."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(run)s] %(stage)s: %(message)s", TIME)
        self._terminal = logging.Formatter("%(stage)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if not sys.stdout.isatty():
            return super().format(record)
        line = self._terminal.format(record)
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
    return JsonFormatter("%(asctime)s %(levelname)s %(run)s %(stage)s %(name)s %(message)s", TIME, rename_fields=names)
