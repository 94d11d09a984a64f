"""Ctrl-C stops a run even if it arrives in a finalizer."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

IN_A_FINALIZER = """
import signal, sys, time
from forge.core.signals import keep_interrupts

class Finalized:
    def __del__(self):
        {what}

{handler}
keep_interrupts()
Finalized()
time.sleep(60)
print("continued")
"""


@pytest.mark.parametrize("handler", ["", "signal.signal(signal.SIGINT, lambda *_: exit(1))"], ids=["python", "flyte"])
def test_ctrl_c_in_a_finalizer_stops_the_run(handler: str) -> None:
    code = IN_A_FINALIZER.format(what="signal.raise_signal(signal.SIGINT)", handler=handler)
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=50)
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "Exception ignored" not in ended.stderr


def test_other_exceptions_in_a_finalizer_are_only_printed() -> None:
    code = IN_A_FINALIZER.format(what="raise ValueError('mine')", handler="time.sleep = lambda _: None")
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (0, "continued\n")
    assert "ValueError: mine" in ended.stderr
