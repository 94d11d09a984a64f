"""The door: what a user reads when a rank fails, on real processes and a real collective."""

import os
import time

import psutil
import pytest
from flytekit import task
from torch import distributed

from tasks.errors import ForgeError
from tasks.finetune.processes import joined
from tasks.finetune.task import Processes, failure_file
from tasks.recipe import TrainingRecipe

TRAINING = TrainingRecipe(rows_per_step=2, epochs=1, learning_rate=0.1, processes=2)


@task(task_config=Processes(nnodes=1, monitor_interval=0.2))
def fails(training: TrainingRecipe, how: str) -> str:
    """One rank fails in the way that `how` names while the other waits for it in a collective."""
    if how == "early" and os.environ["RANK"] == "1":
        raise ValueError("not even joined")
    with joined(failure_file(os.getppid())) as rank:
        distributed.barrier()
        if rank.rank == 1:
            if how == "raise":
                raise ValueError("the reason of rank one")
            if how == "user":
                raise ForgeError("rows are wrong: rows.jsonl:7")
            if how == "kill":
                os.kill(os.getpid(), 9)
        distributed.barrier()
        time.sleep(600)  # the launcher ends it
    return "done"


def workers() -> list[psutil.Process]:
    """Training processes that this one has left (multiprocessing's own tracker lives on)."""
    return [child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", ["failed on rank 1: ValueError: the reason of rank one", "test_task.py"]),
        ("early", ["failed on rank 1", "not even joined"]),
        ("user", ["failed on rank 1: rows are wrong: rows.jsonl:7"]),
    ],
)
def test_the_first_rank_s_own_message_is_what_the_user_reads(how: str, says: list[str]) -> None:
    with pytest.raises(ForgeError) as caught:
        fails(training=TRAINING, how=how)
    for part in says:
        assert part in caught.value.message
    assert "Connection closed" not in caught.value.message
    assert workers() == []


def test_a_killed_rank_is_told() -> None:
    with pytest.raises(ForgeError, match=r"rank 1 ended without a word \(SIGKILL\)"):
        fails(training=TRAINING, how="kill")
    assert workers() == []
