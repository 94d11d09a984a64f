"""The door of fine-tuning: a torch elastic task. On the cluster it is a PyTorchJob's pods, here it is processes."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from flytekit import Cache, FlyteContextManager, HashMethod, task
from flytekit.core.base_task import IgnoreOutputs
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekit.extend import TaskPlugins
from flytekitplugins.kfpytorch import Elastic
from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tasks.contracts import Base, Dataset, Model, cache_key
from tasks.errors import ForgeError
from tasks.recipe import ModelRecipe, TrainingRecipe
from tasks.settings import load_settings
from tasks.storage import open_store
from tasks.version import code_version

RETRIES = 5  # of a run that a drained or reclaimed node ended; other failures are not tried again
# One thread a process until it has counted the cores; and as many seconds, not 30, until the elastic agent kills
# processes that it has told to end: as long may a checkpoint and its copy take.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
# The elastic agent takes these over and does not give them back.
ELASTIC_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Processes(Elastic):
    """An Elastic configuration whose process count is the recipe's (`training.processes`)."""


class TrainingTask(PytorchElasticFunctionTask):
    """Runs the task function in as many processes as the recipe says; a failure is the first failing rank's own."""

    def execute(self, **kwargs: Any) -> Any:
        """Start the processes and return the first rank's result; ForgeError says what failed, and where."""
        self._task_config = replace(self.task_config, nproc_per_node=kwargs["training"].processes)
        local = FlyteContextManager.current_context().execution_state.is_local_execution()
        failure = failure_file(os.getpid())
        failure.unlink(missing_ok=True)
        given = {name: value for name, value in ENVIRONMENT.items() if not os.environ.get(name)}
        os.environ.update(given)
        handlers = {number: signal.getsignal(number) for number in ELASTIC_SIGNALS}
        try:
            return super().execute(**kwargs)
        except IgnoreOutputs:  # the elastic agent was told to end, and has ended the processes
            if local:
                raise KeyboardInterrupt from None
            # A node is drained, or wanted by others: what is saved is gone on from.
            raise FlyteRecoverableException("training was told to stop, and goes on from its last checkpoint") from None
        except FlyteUserRuntimeException as error:
            from tasks.finetune.processes import describe_failure, read_failure

            found = read_failure(failure)
            if found and found["stopped"] and not local:
                raise FlyteRecoverableException(found["message"]) from None
            raise ForgeError(describe_failure(found) if found else describe_exit(error.value, failure)) from None
        finally:
            Console().show_cursor()  # the bar of a process that was ended could not
            for name in given:  # elsewhere in this process, as it was
                del os.environ[name]
            for number, handler in handlers.items():
                signal.signal(number, handler)


def describe_exit(error: ChildFailedError, failure: Path) -> str:
    """What the user reads of a process that ended without saying why: most often the kernel wanted its memory."""
    rank, failed = error.get_first_failure()
    if failed.exitcode > 0:  # it raised before it had joined the others
        return f"training failed on rank {rank}: {failed.message}"
    from tasks.finetune.processes import describe_stacks

    how = signal.Signals(-failed.exitcode).name
    return (
        f"training: rank {rank} ended without a word ({how}); if the machine ran out of memory, lower "
        f"training.rows_per_step or data.context{describe_stacks(failure)}"
    )


TaskPlugins.register_pythontask_plugin(Processes, TrainingTask)


def failure_file(launcher: int) -> Path:
    """Where the ranks that a process launched say which of them failed first."""
    return load_settings().failures / f"training-{launcher}.json"


@task(
    task_config=Processes(nnodes=1, increase_shared_mem=False, monitor_interval=0.2),
    cache=Cache(version=code_version("finetune"), serialize=True),
    retries=RETRIES,
)
def train_model(
    dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe
) -> Annotated[Model, HashMethod(cache_key)]:
    """Packed rows and a base model (or an architecture) to a trained model in the store."""
    from tasks.finetune.processes import joined
    from tasks.finetune.run import train

    with joined(failure_file(os.getppid())) as rank:
        settings = load_settings()
        trained = train(rank, dataset, base, model, training, open_store(settings), settings)
    # Flyte takes the first rank's value; the others have none, and any will do.
    return trained or Model(uri="", digest="", store="", base=Base())
