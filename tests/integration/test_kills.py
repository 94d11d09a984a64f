"""kill -9 of vLLM, the reconciler and the rollout: the desired state is reached again, with one champion.

The rollout either completes or is rolled back. FORGE_TEST_MOMENTS is the number of kills of each; the suite does one,
since vLLM takes long to start again.
"""

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
from openai import OpenAIError

from forge.serving.vllm_process import LocalServer
from tests.integration.registered import Server

pytestmark = pytest.mark.long
MOMENTS = int(os.environ.get("FORGE_TEST_MOMENTS", "1"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("kills"))
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("role", ["rollout", "reconciler", "vllm"])
def test_kill_at_a_random_moment(server: Server, role: str) -> None:
    moments = random.Random(role)
    outcomes = {"finished": 0, "rolled back": 0}
    for _ in range(MOMENTS):
        server.settle()
        server.agrees()
        before = server.champion()
        rollout = server.swap()
        while server.target.document.read()[0].trial is None:
            assert rollout.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 3))
        victim = server.victim(role, rollout)
        if role != "rollout" or rollout.poll() is None:
            os.kill(victim, signal.SIGKILL)
        output, _ = rollout.communicate(timeout=400)
        if role == "vllm":  # its reconciler must notice first
            while (running := LocalServer(server.settings).running()) is None or running.pid == victim:
                time.sleep(0.1)
        server.settle()
        try:
            server.agrees()
        except OpenAIError as error:
            raise AssertionError(f"{error}\n{output}\n{server.target.log.read_text()[-3000:]}") from error
        outcomes["rolled back" if server.champion() == before else "finished"] += 1
    assert sum(outcomes.values()) == MOMENTS, outcomes
