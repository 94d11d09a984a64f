"""A run on one machine reads no description of the cluster."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import SMALL

PROJECT = Path(__file__).parents[2]
# Fails when a file of infra/ is opened, or listed.
HOOK = """
import sys

def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and "/infra/" in f"{arguments[0]}/":
        raise RuntimeError(f"opened {arguments[0]}")

sys.addaudithook(hook)
"""
PREFLIGHT = """
import workflows.launch_plans
from tasks.preflight.task import preflight
from tasks.finetune.task import TRAIN_ON

plan = preflight(data_path="", recipe=sys.argv[1])
print("shape", plan.shape, "runs", TRAIN_ON[plan.shape].name)
"""
SERIALIZE = """
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from tasks.preflight.task import preflight

image = Image("pipeline", "example.org/pipeline", "1")
images = ImageConfig(default_image=image, images=[image, Image("trainer", "example.org/trainer", "1")])
preflight.get_k8s_pod(SerializationSettings(images))
"""


def run(code: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FORGE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", HOOK + code, *arguments], cwd=PROJECT, env=environment, capture_output=True, text=True
    )


def test_preflight_takes_a_shape_that_no_task_has_without_the_node_list(tmp_path: Path) -> None:
    training = {**SMALL["training"], "nodes": 3, "nproc_per_node": 2, "global_batch_size": 6}
    recipe = {**SMALL, "training": training, "serving": {"rollout": False}}
    done = run(PREFLIGHT, tmp_path, yaml.safe_dump(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shape 1x1 runs tasks.finetune.task.train_on_1x1" in done.stdout


def test_help_reads_no_node_list(tmp_path: Path) -> None:
    code = "from flytekit.clis.sdk_in_container.pyflyte import main\nmain()"
    done = run(code, tmp_path, "run", "workflows/training_pipeline.py", "training_pipeline", "--help")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--data_path" in done.stdout


def test_packages_do_read_it(tmp_path: Path) -> None:
    done = run(SERIALIZE, tmp_path)
    assert done.returncode != 0
    assert f"opened {PROJECT / 'infra' / 'nodes.yaml'}" in done.stderr
