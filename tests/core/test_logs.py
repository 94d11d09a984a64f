"""Log lines on a terminal, in a file and in a pod."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.core.logs import EXECUTION, LOGGERS, RUN_ID, run_id, start_logging

PROJECT = Path(__file__).parents[2]
log = logging.getLogger("tasks.preprocess.prepare")


class Terminal(io.StringIO):
    """A stdout that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _loggers_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(EXECUTION, raising=False)
    monkeypatch.setenv(RUN_ID, "0a1b2c3d")
    before = [(logging.getLogger(name), logging.getLogger(name).handlers) for name in LOGGERS]
    yield
    for logger, handlers in before:
        logger.handlers = handlers
        logger.setLevel(logging.NOTSET)


def capture(monkeypatch: pytest.MonkeyPatch, terminal: bool = False) -> io.StringIO:
    """Replace sys.stdout."""
    stdout = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    return stdout


def test_a_terminal_shows_stage_and_message(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = capture(monkeypatch, terminal=True)
    start_logging("preprocess")
    log.info("%d rows", 7)
    log.debug("hidden")
    assert stdout.getvalue() == "preprocess: 7 rows\n"


def test_a_terminal_colours_warnings_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = capture(monkeypatch, terminal=True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    start_logging("preprocess")
    log.warning("a [bold] warning that is longer than %s", "eighty columns, " * 8)
    log.error("an error")
    warning, error = stdout.getvalue().splitlines()
    assert warning.startswith("\x1b[33mpreprocess: a [bold] warning")
    assert error.startswith("\x1b[1;31mpreprocess: an error")


def test_elsewhere_lines_have_time_level_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    output = capture(monkeypatch)
    start_logging("preprocess")
    log.warning("%d rows", 7)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} WARNING \[0a1b2c3d\] preprocess: 7 rows\n", output.getvalue()
    )


def test_pods_log_json_with_the_execution_s_id(monkeypatch: pytest.MonkeyPatch) -> None:
    output = capture(monkeypatch)
    monkeypatch.setenv(EXECUTION, "f0123456789")
    start_logging("train")
    log.info("step %d", 3)
    try:
        raise ValueError("the reason")
    except ValueError:
        log.exception("failed")
    step, failed = map(json.loads, output.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", step.pop("time"))
    assert step == {
        "level": "INFO", "run": "f0123456789", "stage": "train", "message": "step 3",
        "logger": "tasks.preprocess.prepare",
    }  # fmt: skip
    assert (failed["level"], failed["message"]) == ("ERROR", "failed")
    assert "ValueError: the reason" in failed["exc_info"]


@pytest.mark.parametrize("terminal", [True, False])
def test_exceptions_keep_their_traceback(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = capture(monkeypatch, terminal)
    start_logging("train")
    try:
        raise ValueError("the reason")
    except ValueError:
        log.exception("failed")
    assert "train: failed" in stdout.getvalue()
    assert "ValueError: the reason" in stdout.getvalue()


def test_a_later_stage_replaces_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    output = capture(monkeypatch)
    start_logging("preprocess")
    start_logging("train")
    log.info("once")
    assert output.getvalue().count("once") == 1
    assert "train: once" in output.getvalue()
    other = capture(monkeypatch)  # as a progress bar does
    log.info("elsewhere")
    assert "elsewhere" not in output.getvalue()
    assert "train: elsewhere" in other.getvalue()


def test_child_processes_share_the_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_ID)
    own = run_id()
    assert re.fullmatch("[0-9a-f]{8}", own)
    assert run_id() == own
    code = "import logging; from forge.core.logs import start_logging; start_logging('child'); "
    code += "logging.getLogger('forge.core').info('here')"
    child = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert f" INFO [{own}] child: here\n" in child.stdout
    assert child.stderr == ""


def test_nothing_is_configured_on_import() -> None:
    code = "import logging, workflows.training_pipeline; print(logging.getLogger('forge').handlers, "
    code += "logging.getLogger('tasks').handlers)"
    child = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert child.stdout == "[] []\n"
