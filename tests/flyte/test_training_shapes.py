"""Adding a training shape is one line, and a node for it is one entry of the node list."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forge.cluster.nodes import SHAPES
from tests.flyte.package import Package, pod_of

PROJECT = Path(__file__).parents[2]
LAST = "    TrainingShape(2, 2),\n"
NODE = """
  - name: forge-worker-9
    role: training
    pool: primary
    cores: 196
    memory_gib: 2016
    disk_gb: 8000
    gpus: {count: 8, product: H100-80GB}
    labels: {gpu-type: nvidia, nvidia.com/gpu: "true", flyte.org/accelerator: nvidia-h100}
    taints: *gpu-taints
"""


def package(project: Path) -> Package:
    """Compile a project's workflows."""
    command = [Path(sys.executable).parent / "pyflyte", "--pkgs", "workflows", "package", "--output", "package.tgz"]
    command += ["--image", "pipeline=example.org/pipeline:1", "--image", "trainer=example.org/trainer:1"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Package(project / "package.tgz")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with one more shape, of one node with 8 GPUs."""
    for name in ("forge", "tasks", "workflows", "recipes"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "infra").mkdir()
    shutil.copy(PROJECT / "infra" / "nodes.yaml", tmp_path / "infra")
    table = tmp_path / "forge" / "cluster" / "nodes.py"
    text = table.read_text()
    assert text.count(LAST) == 1
    table.write_text(text.replace(LAST, f"{LAST}    TrainingShape(1, 8),\n"))
    return tmp_path


@pytest.mark.parametrize("node", [True, False], ids=["with-node", "without-node"])
def test_a_shape_is_one_line(node: bool, project: Path) -> None:
    if node:
        nodes = project / "infra" / "nodes.yaml"
        nodes.write_text(nodes.read_text().rstrip("\n") + NODE)
    found = package(project)
    spec, container = pod_of(found.tasks["tasks.finetune.task.train_on_1x8"])
    requests = container["resources"]["requests"]
    assert requests["gpu"] == "8"
    assert {one["name"]: one["value"] for one in container["env"]}["FORGE_GPUS"] == "8"
    extended = found.tasks["tasks.finetune.task.train_on_1x8"]["extendedResources"]
    # Without a node that has 8 GPUs, the task exists, and preflight refuses to run it.
    expected = ("192", "2000Gi", "500Gi", "nvidia-h100") if node else ("60", "240Gi", "60Gi", "nvidia-tesla-a100")
    assert (
        requests["cpu"],
        requests["memory"],
        extended["sharedMemory"]["sizeLimit"],
        extended["gpuAccelerator"]["device"],
    ) == expected
    assert spec["nodeSelector"] == {"role": "training", "gpu-type": "nvidia"}
    two = found.tasks["tasks.finetune.task.train_on_1x2"]
    assert two["extendedResources"]["gpuAccelerator"]["device"] == "nvidia-tesla-a100", (
        "the smallest node that holds it"
    )

    (branch,) = found.workflows["workflows.training_pipeline.train_model"]["nodes"]
    cases = [branch["branchNode"]["ifElse"]["case"], *branch["branchNode"]["ifElse"]["other"]]
    routes = {
        case["condition"]["comparison"]["rightValue"]["primitive"]["stringValue"]: case["thenNode"]["taskNode"][
            "referenceId"
        ]["name"]
        for case in cases
    }
    assert routes == {
        **{str(shape): f"tasks.finetune.task.train_on_{shape}" for shape in SHAPES},
        "1x8": "tasks.finetune.task.train_on_1x8",
    }


def test_flyte_finds_each_task_by_its_name() -> None:
    code = (
        "import sys; from flytekit.core.python_auto_container import default_task_resolver as resolver\n"
        "for name in sys.argv[1:]:\n"
        "    task = resolver.load_task(['task-module', 'tasks.finetune.task', 'task-name', name])\n"
        "    print(task.name, task.task_config.nnodes, task.task_config.nproc_per_node)"
    )
    names = [f"train_on_{shape}" for shape in SHAPES]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"tasks.finetune.task.train_on_{shape} {shape.nodes} {shape.nproc_per_node}" for shape in SHAPES
    ]
