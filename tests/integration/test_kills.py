"""kill -9 of vLLM, of the reconciler and of the rollout: what is desired and what is served agree soon, and one version
is the champion. The rollout has either finished or was undone.

FORGE_TEST_MOMENTS says how many moments of each; the suite takes one, since each of vLLM's costs a start of it.
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


@pytest.mark.parametrize("who", ["rollout", "reconciler", "vllm"])
def test_killed_at_any_moment(server: Server, who: str) -> None:
    moments = random.Random(who)
    ends = {"finished": 0, "undone": 0}
    for _ in range(MOMENTS):
        server.settle()
        server.agrees()
        before = server.champion()
        rollout = server.swap()
        while server.target.document.read()[0].trial is None:
            assert rollout.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 3))
        victim = server.victim(who, rollout)
        if who != "rollout" or rollout.poll() is None:
            os.kill(victim, signal.SIGKILL)
        output, _ = rollout.communicate(timeout=400)
        if who == "vllm":  # which its reconciler must first find dead
            while (running := LocalServer(server.settings).running()) is None or running.pid == victim:
                time.sleep(0.1)
        server.settle()
        try:
            server.agrees()
        except OpenAIError as error:
            raise AssertionError(f"{error}\n{output}\n{server.target.log.read_text()[-3000:]}") from error
        ends["undone" if server.champion() == before else "finished"] += 1
    print(who, ends)
    assert sum(ends.values()) == MOMENTS
