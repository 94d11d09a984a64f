"""The training task: what a user reads when a rank fails, with real processes and a real collective."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from flytekit.exceptions.user import FlyteRecoverableException

from forge.core.contracts import Base
from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from tasks.finetune.task import ENVIRONMENT, RETRIES, TRAIN_ON
from tests.conftest import PROJECT, Trained, start_task
from tests.finetune.failing_task import TRAINING, fails

train_on_1x1 = TRAIN_ON["1x1"]


def workers() -> list[psutil.Process]:
    """Child processes that are still training (multiprocessing's resource tracker is not one)."""
    return [child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", ["failed on rank 1: ValueError: the reason of rank one", "failing_task.py"]),
        ("early", ["failed on rank 1", "before joining"]),
        ("user", ["failed on rank 1: rows are wrong: rows.jsonl:7"]),
        ("hang", ["failed on rank 0", "imed out", "rank 1 was in wedged", "failing_task.py", ".rank1.stack"]),
    ],
)
def test_the_error_is_that_of_the_first_failed_rank(how: str, says: list[str]) -> None:
    before = [os.environ.get(name) for name in ENVIRONMENT]
    with pytest.raises(ForgeError) as caught:
        fails(training=TRAINING, how=how)
    assert [os.environ.get(name) for name in ENVIRONMENT] == before
    for part in says:
        assert part in caught.value.message
    assert "Connection closed" not in caught.value.message
    assert workers() == []


def test_a_killed_rank_is_reported() -> None:
    with pytest.raises(ForgeError, match=r"training: rank 1 was killed \(SIGKILL\); if the machine ran out of memory"):
        fails(training=TRAINING, how="kill")
    assert workers() == []


IN_A_POD = """
import sys
from flytekit.core.context_manager import ExecutionState, FlyteContextManager
from tests.finetune.failing_task import TRAINING, fails

if __name__ == "__main__":
    context = FlyteContextManager.current_context()
    state = context.new_execution_state().with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    with FlyteContextManager.with_context(context.with_execution_state(state)):
        fails.execute(training=TRAINING, how=sys.argv[1])
"""


def in_a_pod(tmp_path: Path, how: str) -> subprocess.CompletedProcess:
    """Run `fails` as on the cluster, in another process."""
    (tmp_path / "pod.py").write_text(IN_A_POD)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run([sys.executable, tmp_path / "pod.py", how], env=environment, text=True, capture_output=True)


@pytest.mark.parametrize("how", ["drain", "stopped"])
def test_a_stopped_run_exits_by_the_signal_on_the_cluster(how: str, tmp_path: Path) -> None:
    ended = in_a_pod(tmp_path, how)
    assert ended.returncode == -signal.SIGTERM, ended.stderr


@pytest.mark.long
def test_a_drained_rank_has_time_to_save(tmp_path: Path) -> None:
    in_a_pod(tmp_path, f"drain {tmp_path / 'saved'}")
    assert (tmp_path / "saved").exists()


def test_pid_1_of_a_container_exits_too() -> None:
    """It ignores signals that it sends to itself."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow PID namespaces")
    code = "import os; from forge.core.processes import end_by; assert os.getpid() == 1; end_by(15)"
    ended = subprocess.run([*command, sys.executable, "-c", code], cwd=PROJECT)
    assert ended.returncode == 128 + signal.SIGTERM


def files_of(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.pb")}


def test_a_stopped_run_resumes_and_is_published_once(trained: Trained, recipe: Recipe, tmp_path: Path) -> None:
    """Started three times as Flyte does: stopped, resumed to the end, and once more as if its end had been missed."""
    home = Path(os.environ["FORGE_HOME"])
    shutil.copytree(trained.store.root, home / "store")
    rows = (home / "store" / "datasets" / f"sha256-{trained.dataset.digest}").as_uri()
    inputs = {
        "dataset": trained.dataset.model_copy(update={"uri": rows, "report": f"{rows}/report.html"}),
        "base": Base(),
        "model": recipe.model,
        "training": recipe.training.model_copy(update={"epochs": 1.0}),
    }
    outputs = tmp_path / "outputs"
    pod = {"FLYTE_INTERNAL_EXECUTION_ID": "f1"}
    process = start_task(train_on_1x1, inputs, str(outputs), tmp_path, **pod)
    assert process.stdout
    for line in process.stdout:
        if "steps of" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == -signal.SIGTERM, (tmp_path / "stderr").read_text()
    assert files_of(outputs) == set()
    for says in (r"resuming after step \d", "was published before"):
        process = start_task(train_on_1x1, inputs, str(outputs), tmp_path, **pod)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, (tmp_path / "stderr").read_text()
        assert re.search(says, printed), printed
        assert files_of(outputs) == {"outputs.pb"}
        assert list((home / "checkpoints").iterdir()) == []
        assert not re.search("ERROR|Traceback", (tmp_path / "stderr").read_text())
        (outputs / "outputs.pb").unlink()


STOPPED_LATE = """
import os, signal, time
from tasks.finetune import run
from tasks.finetune.task import train

def published(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("published", flush=True)

run.train = published
train(None, None, None, None)
print("continued", flush=True)
"""


def test_a_rank_stopped_after_its_last_step_exits_by_the_signal(tmp_path: Path) -> None:
    """Its launcher no longer reads its result, and would wait until it kills the rank."""
    environment = os.environ | {"FORGE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_LATE], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (-signal.SIGTERM, ["published"]), done.stderr


def test_missing_gpus_fail_a_training(trained: Trained, recipe: Recipe, tmp_path: Path) -> None:
    inputs = {
        "dataset": trained.dataset,
        "base": Base(),
        "model": recipe.model,
        "training": recipe.training,
    }
    process = start_task(train_on_1x1, inputs, str(tmp_path / "outputs"), tmp_path, FORGE_GPUS="3")
    printed, _ = process.communicate(timeout=300)
    assert "steps of" not in printed
    assert files_of(tmp_path / "outputs") == {"error.pb"}
    said = (tmp_path / "outputs" / "error.pb").read_bytes().decode(errors="replace")
    assert re.search(
        "training failed on rank 0: GPUs: this pod requested 3, and torch sees [0-2] on .*nvidia-smi", said
    )


NODE = """
import os, sys
from pathlib import Path
from torch import distributed
from tasks.finetune.process_group import process_group

with process_group(Path(sys.argv[1]) / f"failure-{os.getppid()}.json") as rank:
    if rank.rank == 1:
        raise ValueError("the reason of rank one")
    distributed.barrier()
"""


def test_the_first_failure_is_found_across_nodes(tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text(NODE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--master-port", str(port)]
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(node), str(tmp_path / "node.py"), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(PROJECT)}, text=True, stderr=subprocess.PIPE,
        )
        for node in range(2)
    ]  # fmt: skip
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert "training failed on rank 1: ValueError: the reason of rank one" in errors


NODE_DONE = """
import os, sys
from flytekit import task
from flytekit.core.base_task import IgnoreOutputs
from flytekit.core.context_manager import ExecutionState, FlyteContextManager
from forge.core.contracts import Base, Model
from tasks.finetune.task import Processes
from forge.core.recipe import TrainingRecipe

@task(task_config=Processes(nnodes=2, increase_shared_mem=False))
def trains(training: TrainingRecipe) -> Model:
    rank = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    return Model(uri=rank, digest="", store="", base=Base())

if __name__ == "__main__":
    context = FlyteContextManager.current_context()
    state = context.new_execution_state().with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    pod = context.with_execution_state(state)
    training = TrainingRecipe(global_batch_size=2, epochs=1, learning_rate=0.1, nodes=2, nproc_per_node=1)
    with FlyteContextManager.with_context(pod):
        try:
            print("outputs:", trains.execute(training=training).uri)
        except IgnoreOutputs:
            print("no outputs on this node")
"""


def test_one_node_has_the_outputs_and_none_is_retried(tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text(NODE_DONE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": f"{PROJECT}:{tmp_path}", "PET_NNODES": "2",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
    }  # fmt: skip
    nodes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "node.py")],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    lasts = sorted(out.splitlines()[-1] for out, _ in outputs)
    assert lasts == ["no outputs on this node", "outputs: rank 0 of 2"], outputs


def test_only_preemptions_are_retried() -> None:
    assert train_on_1x1.metadata.retries == RETRIES
    assert not issubclass(ForgeError, FlyteRecoverableException)
