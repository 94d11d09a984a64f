"""After Ctrl-C at any moment no process and no lock is left, and the next run works."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.integration.harness import Home, gone, wait_for


def assert_clean(home: Home, output: str) -> None:
    """Assert that no process of the home is left and no trial is in progress."""
    left = home.processes()
    try:
        assert gone(left, within=30), f"{left}\n{output}"
        assert home.desired().trial is None
        assert "SignalException" not in output
    finally:
        for process in left:
            process.kill()


@pytest.mark.long
def test_interrupt_of_each_stage_and_then_a_complete_run(tmp_path: Path) -> None:
    home = Home(tmp_path)
    moments = random.Random(7)
    try:
        for after, number in (
            ("Running Execution", signal.SIGINT),
            ("preprocess: ", signal.SIGINT),
            ("train: ", signal.SIGTERM),
            ("train: step", signal.SIGINT),
            ("evaluate: ", signal.SIGINT),
            ("vLLM is starting", signal.SIGINT),
            ("vLLM is starting", signal.SIGTERM),
        ):
            process = home.start()
            output = wait_for(process, after)
            time.sleep(moments.uniform(0, 2 if "vLLM" not in after else 20))
            output += home.interrupt(process, number)
            assert process.returncode != 0, f"{after}\n{output}"
            assert_clean(home, output)
        status, output = home.run()
        assert status == 0, output
        assert home.facts()["version"] == "1"
    finally:
        home.stop()
    assert gone(home.processes())
