"""The doors of fine-tuning: torch elastic tasks. On the cluster they are pods with GPUs, here they are processes.

One door for each shape, since Flyte cannot change how many nodes a registered task has; `training_pipeline` goes
through the recipe's. Importing them imports no torch.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flytekit import Cache, FlyteContextManager, HashMethod, PythonFunctionTask, task
from flytekit.core.base_task import IgnoreOutputs
from flytekit.exceptions.user import FlyteUserRuntimeException
from flytekit.extend import TaskPlugins
from flytekitplugins.kfpytorch import CleanPodPolicy, Elastic, RunPolicy
from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask
from rich.console import Console

from forge.cluster.nodes import SHAPES, TrainingShape
from forge.core.code_version import code_version
from forge.core.contracts import Base, Dataset, Model, cache_key
from forge.core.errors import ForgeError
from forge.core.logs import start_logging
from forge.core.processes import end_by, end_soon
from forge.core.recipe import ModelRecipe, TrainingRecipe
from forge.core.settings import load_settings
from forge.storage import open_store
from tasks.task_pods import on_gpus

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

HOURS = 48  # that a training may take
RETRIES = 5  # of a run that a drained or reclaimed node ended; other failures are not tried again
# One thread a process until it has counted the cores; and as many seconds, not 30, until the elastic agent kills
# processes that it has told to end: as long may a checkpoint and its copy take.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
# The elastic agent takes these over and does not give them back.
ELASTIC_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Processes(Elastic):
    """An Elastic configuration whose process count is the recipe's (`training.nproc_per_node`)."""


class TrainingTask(PytorchElasticFunctionTask):
    """Runs the task function in as many processes as the recipe says; a failure is the first failing rank's own.

    Without a cluster, those of all nodes run on this machine.
    """

    def __init__(self, task_config: Processes, task_function: Callable[..., Any], **kwargs: Any) -> None:
        # As the plugin's own, which imports torch to read the number of nodes.
        alone = task_config.nnodes == 1
        kind = self._ELASTIC_TASK_TYPE_STANDALONE if alone else self._ELASTIC_TASK_TYPE
        PythonFunctionTask.__init__(self, task_config, task_function, task_type=kind, task_type_version=1, **kwargs)
        self.min_nodes = self.max_nodes = int(task_config.nnodes)
        self.rdzv_backend = "c10d"

    def execute(self, **kwargs: Any) -> Any:
        """Start the processes and return the first rank's result; ForgeError says what failed, and where.

        On the cluster, a training that was told to stop ends this process by SIGTERM, which Flyte tries again. An
        exception would leave an error file, and Flyte takes that for the end of the attempt, even where a queue has
        suspended the job and its workers go on in the same attempt.
        """
        training = kwargs["training"]
        local = FlyteContextManager.current_context().execution_state.is_local_execution()
        processes = training.nproc_per_node
        if local:
            processes *= training.nodes
            self.min_nodes = self.max_nodes = 1
        self._task_config = replace(self.task_config, nproc_per_node=processes)
        failure = failure_file(os.getpid())
        failure.unlink(missing_ok=True)
        given = {name: value for name, value in ENVIRONMENT.items() if not os.environ.get(name)}
        os.environ.update(given)
        handlers = {number: signal.getsignal(number) for number in ELASTIC_SIGNALS}
        started = time.time()
        try:
            model: Model = super().execute(**kwargs)
            # Starting the processes is part of the work, as starting vLLM is of a rollout's.
            return model.model_copy(update={"started": started, "seconds": time.time() - started})
        except IgnoreOutputs as error:
            if error.__context__ is None:  # done, on another node than the first rank's
                raise
            # The elastic agent was told to end, and has ended the processes. On the cluster, a node is drained or
            # wanted by others: what is saved is gone on from.
            if local:
                raise KeyboardInterrupt from None
            end_by(signal.SIGTERM)
        except FlyteUserRuntimeException as error:
            from tasks.finetune.process_group import describe_failure, read_failure

            found = read_failure(failure)
            if found and found["stopped"] and not local:
                end_by(signal.SIGTERM)
            raise ForgeError(describe_failure(found) if found else describe_exit(error.value, failure)) from None
        finally:
            Console().show_cursor()  # the bar of a process that was ended could not
            for name in given:  # elsewhere in this process, as it was
                del os.environ[name]
            for number, handler in handlers.items():
                signal.signal(number, handler)


def describe_exit(error: "ChildFailedError", failure: Path) -> str:
    """What the user reads of a process that ended without saying why: most often the kernel wanted its memory."""
    rank, failed = error.get_first_failure()
    if failed.exitcode > 0:  # it raised before it had joined the others
        return f"training failed on rank {rank}: {failed.message}"
    from tasks.finetune.process_group import describe_stacks

    how = signal.Signals(-failed.exitcode).name
    return (
        f"training: rank {rank} ended without a word ({how}); if the machine ran out of memory, lower "
        f"training.global_batch_size or data.max_seq_len{describe_stacks(failure)}"
    )


TaskPlugins.register_pythontask_plugin(Processes, TrainingTask)


def failure_file(launcher: int) -> Path:
    """Where the ranks that a process launched say which of them failed first; on the cluster, those of all nodes."""
    execution = os.environ.get("FLYTE_INTERNAL_EXECUTION_ID")
    return load_settings().failures / f"training-{execution or launcher}.json"


def shaped(shape: TrainingShape) -> dict[str, Any]:
    """What makes a task one that trains in a shape."""
    waiting = 900  # seconds that nodes wait for one another: an image may have to be pulled first
    return {
        "task_config": Processes(
            nnodes=shape.nodes,
            nproc_per_node=shape.nproc_per_node,
            increase_shared_mem=False,  # Flyte's shared_memory says how much
            monitor_interval=0.2,
            rdzv_configs={"timeout": waiting, "join_timeout": waiting, "read_timeout": waiting},
            run_policy=RunPolicy(clean_pod_policy=CleanPodPolicy.ALL, ttl_seconds_after_finished=24 * 3600),
        ),
        "cache": Cache(version=code_version("tasks.finetune"), serialize=True),
        "retries": RETRIES,
        **on_gpus(shape, hours=HOURS),
    }


ONE_GPU, ONE_NODE, TWO_NODES = SHAPES


@task(**shaped(ONE_GPU))
def train_on_1x1(
    dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe
) -> Annotated[Model, HashMethod(cache_key)]:
    """Packed rows and a base model (or an architecture) to a trained model in the store, on one GPU."""
    return train(dataset, base, model, training)


@task(**shaped(ONE_NODE))
def train_on_1x2(
    dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe
) -> Annotated[Model, HashMethod(cache_key)]:
    """The same on the two GPUs of a node."""
    return train(dataset, base, model, training)


@task(**shaped(TWO_NODES))
def train_on_2x2(
    dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe
) -> Annotated[Model, HashMethod(cache_key)]:
    """The same on the four GPUs of two nodes: a PyTorchJob."""
    return train(dataset, base, model, training)


def train(dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe) -> Model:
    """What each process of a training does."""
    from tasks.finetune import run
    from tasks.finetune.process_group import process_group

    start_logging("train")
    settings = load_settings()
    with process_group(failure_file(os.getppid()), settings.gpus) as rank:
        trained = run.train(rank, dataset, base, model, training, open_store(settings), settings)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank.stop.is_set():
        # Told to stop after the last step. The launcher takes no result any more, and this process would wait for it
        # to do so until it is killed, in ten minutes. The next attempt finds what is published.
        end_by(signal.SIGTERM)
    end_soon()
    # Flyte takes the first rank's value; the others have none, and any will do.
    return trained or Model(uri="", digest="", store="", base=Base())
