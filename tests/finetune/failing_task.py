"""A training task that fails in many ways. Its ranks import this module, so it imports little."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

from flytekit import task
from torch import distributed

from forge.core.errors import ForgeError
from forge.core.recipe import TrainingRecipe
from tasks.finetune import process_group as module
from tasks.finetune.process_group import Stopped, process_group
from tasks.finetune.task import Processes, failure_file

TRAINING = TrainingRecipe(global_batch_size=2, epochs=1, learning_rate=0.1, nproc_per_node=2)


@task(task_config=Processes(nnodes=1, monitor_interval=0.2))
def fails(training: TrainingRecipe, how: str) -> str:
    """One rank fails as `how` says while the other waits for it in a collective."""
    if how == "early" and os.environ["RANK"] == "1":
        raise ValueError("before joining")
    if how == "hang":
        module.COLLECTIVE_TIMEOUT = timedelta(seconds=4)
    with process_group(failure_file(os.getppid())) as rank:
        rank.heartbeat()
        distributed.barrier()
        if rank.rank == 1:
            if how == "raise":
                raise ValueError("the reason of rank one")
            if how == "user":
                raise ForgeError("rows are wrong: rows.jsonl:7")
            if how == "kill":
                os.kill(os.getpid(), 9)
            if how == "hang":
                wedged()
        if how.startswith("drain"):
            if rank.first:
                os.kill(os.getppid(), signal.SIGTERM)
            while not rank.stop.is_set():  # Event.wait may hold the lock that the signal handler needs
                time.sleep(0.05)
            if how != "drain" and rank.first:
                time.sleep(35)  # longer than the launcher waits by default
                Path(how.removeprefix("drain ")).touch()
            raise Stopped("everything is saved")
        if how == "stopped" and rank.first:
            raise Stopped("everything is saved")
        distributed.barrier()
        time.sleep(600)  # until the launcher stops it
    return "done"


def wedged() -> None:
    """Where a rank hangs."""
    time.sleep(12)
