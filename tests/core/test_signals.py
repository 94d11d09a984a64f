import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

IN_A_FINALISER = """
import signal, sys, time
from forge.core.signals import keep_interrupts

class Finalised:
    def __del__(self):
        {what}

{handler}
keep_interrupts()
Finalised()
time.sleep(60)
print("went on")
"""


@pytest.mark.parametrize("handler", ["", "signal.signal(signal.SIGINT, lambda *_: exit(1))"], ids=["python", "flyte"])
def test_one_that_falls_into_a_finaliser_still_ends_the_run(handler: str) -> None:
    code = IN_A_FINALISER.format(what="signal.raise_signal(signal.SIGINT)", handler=handler)
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=50)
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "Exception ignored" not in ended.stderr


def test_other_failures_of_a_finaliser_are_reported_as_ever() -> None:
    code = IN_A_FINALISER.format(what="raise ValueError('mine')", handler="time.sleep = lambda _: None")
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (0, "went on\n")
    assert "ValueError: mine" in ended.stderr
