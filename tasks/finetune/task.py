"""The Flyte tasks of fine-tuning, one per shape: torch elastic tasks, in GPU pods on the cluster, else in processes.

`training_pipeline` runs the task of the recipe's shape. Importing this module imports no torch.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from filelock import FileLock, Timeout
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
from tasks.task_pods import OnTrainingNodes, on_gpus

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

log = logging.getLogger(__name__)

HOURS = 48  # timeout of a training
RETRIES = 5  # after a node was drained or reclaimed; other failures are not retried
# One OpenMP thread until a process has counted its cores. And 600 rather than 30 seconds until the elastic agent kills
# processes that it has sent SIGTERM: they may be saving and copying a checkpoint.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
# The elastic agent replaces these handlers and does not restore them.
ELASTIC_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Processes(Elastic):
    """An Elastic configuration; the number of processes at run time is the recipe's `training.nproc_per_node`."""


class TrainingTask(OnTrainingNodes, PytorchElasticFunctionTask):
    """Runs the task function in the recipe's processes; on one machine, in those of all its nodes.

    If ranks fail, the error is that of the first rank that failed.
    """

    def __init__(self, task_config: Processes, task_function: Callable[..., Any], **kwargs: Any) -> None:
        # Like the plugin's __init__, which would import torch to parse the number of nodes.
        kind = self._ELASTIC_TASK_TYPE_STANDALONE if task_config.nnodes == 1 else self._ELASTIC_TASK_TYPE
        PythonFunctionTask.__init__(self, task_config, task_function, task_type=kind, task_type_version=1, **kwargs)
        self.min_nodes = self.max_nodes = int(task_config.nnodes)
        self.rdzv_backend = "c10d"

    @property
    def shape(self) -> TrainingShape:
        """Nodes, and processes (GPUs) per node."""
        return TrainingShape(int(self.task_config.nnodes), self.task_config.nproc_per_node)

    def execute(self, **kwargs: Any) -> Any:
        """Start the processes and return rank 0's result. Raises ForgeError with the failed rank and its error.

        On the cluster, if the training received SIGTERM, this process exits by SIGTERM too, and Flyte retries it. An
        exception would write an error file, which ends the attempt for Flyte, even if a queue only suspended the job
        and its workers will resume within the same attempt.
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
        added = {name: value for name, value in ENVIRONMENT.items() if not os.environ.get(name)}
        os.environ.update(added)
        handlers = {number: signal.getsignal(number) for number in ELASTIC_SIGNALS}
        started = time.time()
        try:
            with job_lock(**kwargs) if local and "dataset" in kwargs else nullcontext():
                model: Model = super().execute(**kwargs)
            # Count the start of the processes as well, as a rollout counts vLLM's start.
            return model.model_copy(update={"started": started, "seconds": time.time() - started})
        except IgnoreOutputs as error:
            if error.__context__ is None:  # success, on a node without rank 0
                raise
            # The elastic agent received a signal and stopped the processes. On the cluster, a node is being drained or
            # reclaimed; the next attempt resumes from the checkpoint.
            if local:
                raise KeyboardInterrupt from None
            end_by(signal.SIGTERM)
        except FlyteUserRuntimeException as error:
            from tasks.finetune.process_group import describe_failure, read_failure

            report = read_failure(failure)
            if report and report["stopped"] and not local:
                end_by(signal.SIGTERM)
            raise (ForgeError(describe_failure(report)) if report else exit_error(error.value, failure)) from None
        finally:
            Console().show_cursor()  # a killed process leaves it hidden by its progress bar
            for name in added:  # later stages of a local run share this process
                del os.environ[name]
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def job_lock(dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe) -> Iterator[None]:
    """Let one run of a job at a time train on this machine: another one has the same checkpoints, and this result.

    The launcher holds the lock, so no rank waits in a collective.
    """
    from tasks.finetune.run import job_key

    checkpoints = load_settings().checkpoints
    checkpoints.mkdir(parents=True, exist_ok=True)
    lock = FileLock(checkpoints / f"{job_key(dataset.digest, base, model, training)}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.info("another run on this machine trains the same model; waiting for it to end")
        held = lock.acquire()
    with held:
        yield


def exit_error(error: "ChildFailedError", failure: Path) -> ForgeError:
    """The error for a process that left no failure report: usually one that the kernel killed to free memory."""
    rank, failed = error.get_first_failure()
    if failed.exitcode > 0:  # it raised before it joined the process group
        return ForgeError(f"training failed on rank {rank}: {failed.message}")
    from tasks.finetune.process_group import describe_stacks

    name = signal.Signals(-failed.exitcode).name
    return ForgeError(
        f"rank {rank} was killed ({name})",
        where="training",
        fix="if the machine ran out of memory, lower training.micro_batch_size or data.max_seq_len"
        f"{describe_stacks(failure)}",
    )


TaskPlugins.register_pythontask_plugin(Processes, TrainingTask)


def failure_file(launcher: int) -> Path:
    """Where ranks report the first failure: those that one process launched; on the cluster, those of all nodes."""
    execution = os.environ.get("FLYTE_INTERNAL_EXECUTION_ID")
    return load_settings().failures / f"training-{execution or launcher}.json"


def task_options(shape: TrainingShape) -> dict[str, Any]:
    """Arguments of `@task` for a training in a shape."""
    waiting = 900  # seconds that nodes wait for one another: an image may have to be pulled first
    return {
        **on_gpus(shape, hours=HOURS),
        "task_config": Processes(
            nnodes=shape.nodes,
            nproc_per_node=shape.nproc_per_node,
            increase_shared_mem=False,  # OnTrainingNodes sets it
            monitor_interval=0.2,
            rdzv_configs={"timeout": waiting, "join_timeout": waiting, "read_timeout": waiting},
            run_policy=RunPolicy(clean_pod_policy=CleanPodPolicy.ALL, ttl_seconds_after_finished=24 * 3600),
        ),
        "cache": Cache(version=code_version("tasks.finetune"), serialize=True),
        "retries": RETRIES,
    }


def train(dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe) -> Model:
    """Train in one of the processes: what each rank runs."""
    from tasks.finetune import run
    from tasks.finetune.process_group import process_group

    start_logging("train")
    settings = load_settings()
    with process_group(failure_file(os.getppid()), settings.gpus) as rank:
        trained = run.train(rank, dataset, base, model, training, open_store(settings), settings)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank.stop.is_set():
        # SIGTERM arrived after the last step. The launcher no longer reads results, so this process would block until
        # it is killed, ten minutes later. The next attempt finds the published model.
        end_by(signal.SIGTERM)
    end_soon()
    # Flyte takes rank 0's value and ignores the others'.
    return trained or Model(uri="", digest="", store="", base=Base())


# The task for each shape, by the shape's name. Each is also an attribute of this module, train_on_<nodes>x<GPUs>, which
# is where flytekit looks for it in a pod.
TRAIN_ON: dict[str, Any] = {}
for _shape in SHAPES:

    def _train_on(
        dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe
    ) -> Annotated[Model, HashMethod(cache_key)]:
        """Train a base model, or a new one of the given architecture, on packed rows. The result is in the store."""
        return train(dataset, base, model, training)

    _train_on.__name__ = _train_on.__qualname__ = f"train_on_{_shape}"
    globals()[_train_on.__name__] = TRAIN_ON[str(_shape)] = task(**task_options(_shape))(_train_on)
