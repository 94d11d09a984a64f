"""The package that `make package` writes."""

import datetime
import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from flytekit import HashMethod

from forge.cluster.gpus import GPUS
from forge.cluster.nodes import (
    KEPT_CORES,
    KEPT_MEMORY,
    SHAPES,
    TIME_ZONE,
    TRAINING,
    TRAINING_HOURS,
    all_nodes,
    nodes_of,
)
from forge.storage.recipes import RECIPES, load_recipe
from tasks.finetune.task import ENVIRONMENT
from tests.flyte.package import Package, pod_of, quantity, short

PROJECT = Path(__file__).parents[2]
SECRETS = {
    "FORGE_S3_ACCESS_KEY": "an-access-key-9f2c",
    "FORGE_S3_SECRET_KEY": "a-secret-key-41d7",
    "HF_TOKEN": "hf_c3d9",
}
PLACES = {"FORGE_STORE": "s3://forge/store", "FORGE_NOTIFY": "ml@example.org, night@example.org"}
GPU_TASKS = {"evaluate_model", *(f"train_on_{shape}" for shape in SHAPES)}
# Schedules: hour and weekday (Monday is 0; None: every day) in the cluster's time zone.
SCHEDULES = {
    "nightly_fine_tune": (7, None),
    "weekly_champion_check": (19, 6),
    "registry_retention": (6, 6),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    path = tmp_path_factory.mktemp("package") / "package.tgz"
    command = ["make", "package", "REGISTRY=example.org/forge", "TAG=0123456789ab", f"PACKAGE={path}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FORGE_", "MAKE"))}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment | SECRETS | PLACES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Package(path)


def test_no_two_entities_have_the_same_name(package: Package) -> None:
    assert len(package.names) > 30
    assert len(set(package.names)) == len(package.names)


def test_images_are_pinned_and_only_tasks_that_need_torch_use_the_trainer(package: Package) -> None:
    for name, task in package.tasks.items():
        image = "trainer" if short(name) in {*GPU_TASKS, "preflight"} else "pipeline"
        assert pod_of(task)[1]["image"] == f"example.org/forge/forge-{image}:0123456789ab", name


def test_each_pod_fits_its_nodes_and_tolerates_their_taints(package: Package) -> None:
    for name, task in package.tasks.items():
        spec, container = pod_of(task)
        requests = container["resources"]["requests"]
        assert requests == container["resources"]["limits"], name
        gpus = quantity(requests.get("gpu", "0"))
        assert (gpus > 0) == (short(name) in GPU_TASKS), name
        labels = spec["nodeSelector"]
        able = [
            node
            for node in all_nodes()
            if labels.items() <= {"role": node.role, "pool": node.pool, **node.labels}.items()
        ]
        assert able, f"no node has {labels}"
        tolerated = [(one["key"], one["value"], one["effect"]) for one in spec.get("tolerations", [])]
        for node in able:
            assert quantity(requests["cpu"]) <= node.cores - KEPT_CORES, name
            assert quantity(requests["memory"]) <= node.memory_gib - KEPT_MEMORY, name
            assert gpus <= (node.gpus.count if node.gpus else 0), name
            assert [(one.key, one.value, one.effect) for one in node.taints] == tolerated, name


def test_two_single_gpu_pods_fit_one_node(package: Package) -> None:
    half = pod_of(package.tasks["tasks.finetune.task.train_on_1x1"])[1]["resources"]["requests"]
    node = nodes_of(TRAINING)[0]
    assert 2 * quantity(half["cpu"]) <= node.cores - KEPT_CORES
    assert 2 * quantity(half["memory"]) <= node.memory_gib - KEPT_MEMORY


def test_each_shape_has_a_task(package: Package) -> None:
    for shape in SHAPES:
        task = package.tasks[f"tasks.finetune.task.train_on_{shape}"]
        assert quantity(pod_of(task)[1]["resources"]["requests"]["gpu"]) == shape.nproc_per_node
        assert task["type"] == ("pytorch" if shape.nodes > 1 else "python-task")
        if shape.nodes > 1:
            job = task["custom"]
            assert job["workerReplicas"]["replicas"] == shape.nodes
            elastic = job["elasticConfig"]
            assert (elastic["minReplicas"], elastic["maxReplicas"]) == (shape.nodes, shape.nodes)
            assert elastic["nprocPerNode"] == shape.nproc_per_node
            assert job["runPolicy"]["cleanPodPolicy"] == "CLEANPOD_POLICY_ALL"
            claims = [
                one["persistentVolumeClaim"] for one in pod_of(task)[0]["volumes"] if "persistentVolumeClaim" in one
            ]
            assert claims == [{"claimName": "forge-training"}], "all nodes mount the checkpoints"


def test_gpu_pods_have_shared_memory_and_name_the_accelerator_of_their_nodes(package: Package) -> None:
    (device,) = {node.labels["flyte.org/accelerator"] for node in nodes_of(TRAINING)}
    for name in package.tasks:
        if short(name) in GPU_TASKS:
            task = package.tasks[name]
            extended = task["extendedResources"]
            assert extended["gpuAccelerator"]["device"] == device
            shared = quantity(extended["sharedMemory"]["sizeLimit"])
            assert 8 <= shared < quantity(pod_of(task)[1]["resources"]["limits"]["memory"])
            variables = {one["name"]: one["value"] for one in pod_of(task)[1]["env"]}
            assert variables["NCCL_SOCKET_IFNAME"] == "eth0"
            assert variables["FORGE_GPUS"] == pod_of(task)[1]["resources"]["requests"]["gpu"]
            assert pod_of(task)[0]["runtimeClassName"] == "nvidia"
            assert pod_of(task)[0]["priorityClassName"] == "forge-training"
    assert {node.gpus.product for node in nodes_of(TRAINING) if node.gpus} <= set(GPUS)


def test_settings_and_secrets_are_referenced_not_copied(package: Package) -> None:
    for value in SECRETS.values():
        assert value.encode() not in package.bytes
    for name, task in package.tasks.items():
        secrets = {one["envVar"]: (one["group"], one["mountRequirement"]) for one in task["securityContext"]["secrets"]}
        assert secrets == dict.fromkeys(SECRETS, ("forge-secrets", "ENV_VAR")), name
        container = pod_of(task)[1]
        assert container["envFrom"] == [{"configMapRef": {"name": "forge-settings"}}], name
        # Settings come from the ConfigMap, except for the GPUs of the pod itself.
        ours = [one["name"] for one in container.get("env", []) if one["name"].startswith("FORGE_")]
        assert ours == (["FORGE_GPUS"] if short(name) in GPU_TASKS else []), name


def test_pods_run_as_an_unprivileged_user(package: Package) -> None:
    for name, task in package.tasks.items():
        spec, container = pod_of(task)
        # The Pod Security level `restricted`, which the namespaces of tasks enforce.
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"], name
        kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "projected", "persistentVolumeClaim"}, name
        assert spec["enableServiceLinks"] is False, name


def test_only_rollout_tasks_have_a_token_for_the_api_server(package: Package) -> None:
    for name, task in package.tasks.items():
        spec, _ = pod_of(task)
        rolls_out = short(name) in ("roll_out", "roll_back")
        assert spec["automountServiceAccountToken"] is rolls_out, name
        assert spec.get("serviceAccountName", "") == ("forge-rollout" if rolls_out else ""), name


def test_grace_periods_are_long_enough(package: Package) -> None:
    for name, task in package.tasks.items():
        seconds = int(pod_of(task)[0]["terminationGracePeriodSeconds"])
        # The time for a checkpoint and its copy, and half a minute for the rest.
        minimum = int(ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 30 if "train_on" in name else 60
        assert seconds >= minimum, name


def sources(package: Package, workflow: str, binding: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The tasks and outputs that a node's input comes from, through sub-workflows; never an attribute of an output."""
    promise = binding["binding"].get("promise")
    if promise is None:
        return
    assert "attrPath" not in promise, f"{workflow}: {binding['var']} is an attribute of {promise['nodeId']}'s output"
    if promise.get("nodeId", "start-node") in ("", "start-node"):
        for caller, node in package.nodes():
            if node.get("workflowNode", {}).get("subWorkflowRef", {}).get("name") == workflow:
                (outer,) = (one for one in node["inputs"] if one["var"] == promise["var"])
                yield from sources(package, caller, outer)
        return
    for _, node in package.nodes(workflow):
        if node["id"] == promise["nodeId"] and "taskNode" in node:
            yield node["taskNode"]["referenceId"]["name"], promise["var"]


def test_cached_tasks_take_whole_outputs_with_a_hash_method(package: Package) -> None:
    """Flyte serializes an attribute of an output again in each execution, in another order: no cache would hit."""
    seen = set()
    for workflow, node in package.nodes():
        name = node.get("taskNode", {}).get("referenceId", {}).get("name", "")
        if not name or not package.tasks[name]["metadata"].get("discoverable"):
            continue
        for binding in node["inputs"]:
            for task, output in sources(package, workflow, binding):
                module, _, function = task.rpartition(".")
                kind = getattr(importlib.import_module(module), function).python_interface.outputs[output]
                hashed = any(isinstance(one, HashMethod) for one in getattr(kind, "__metadata__", ()))
                assert kind in (str, int, float, bool) or hashed, f"{task}: {output} has no HashMethod"
                seen.add((short(name), binding["var"], short(task)))
    assert {("preprocess_data", "data", "preflight"), ("evaluate_model", "champion", "current_champion")} <= seen
    assert ("train_on_2x2", "training", "preflight") in seen, "through the sub-workflow"


def test_only_training_is_retried_and_costly_stages_are_cached(package: Package) -> None:
    for name, task in package.tasks.items():
        training = "train_on" in name
        assert task["metadata"]["retries"].get("retries", 0) == (5 if training else 0), name
        assert quantity(task["metadata"]["timeout"].removesuffix("s")) >= 3600, name
        cached = training or short(name) in ("preprocess_data", "evaluate_model")
        assert task["metadata"].get("discoverable", False) is cached, name
        if cached:
            assert re.fullmatch(r"[0-9a-f]{16}", task["metadata"]["discoveryVersion"]), name
            assert task["metadata"]["cacheSerializable"] is True, name


def test_every_input_of_every_node_is_bound(package: Package) -> None:
    seen = set()
    for workflow, node in package.nodes():
        reference = node.get("taskNode", {}).get("referenceId") or node["workflowNode"]["subWorkflowRef"]
        bound = {binding["var"] for binding in node.get("inputs", [])}
        assert bound == set(package.inputs(reference)), f"{workflow}: {node['id']}"
        seen.add(short(reference["name"]))
    last = {"announce_rejection", "report_failure"}
    assert seen >= {"preflight", "train_on_2x2", "release", "roll_out", "check_champion"} | last


def test_stages_have_node_names(package: Package) -> None:
    pipeline = package.workflows["workflows.training_pipeline.training_pipeline"]
    names = [node["id"] for node in pipeline["nodes"]]
    assert {"preflight", "preprocess", "train", "evaluate"} <= set(names)


def test_plans_run_one_at_a_time_and_notify_of_failures(package: Package) -> None:
    plans = {name: plan for name, plan in package.plans.items() if not name.startswith("workflows.")}
    assert set(plans) == {*SCHEDULES, *(f"train_{path.stem}" for path in RECIPES.glob("*.yaml"))}
    for name, plan in plans.items():
        assert plan["concurrencyPolicy"] == {"max": 1, "behavior": "CONCURRENCY_LIMIT_BEHAVIOR_SKIP"}
        assert plan["maxParallelism"] == 8
        assert plan["labels"]["values"]["forge/plan"] == name
        assert plan["rawOutputDataConfig"]["outputLocationPrefix"] == "s3://forge/store/flyte"
        (notification,) = plan["entityMetadata"]["notifications"]
        assert notification["email"]["recipientsEmail"] == ["ml@example.org", "night@example.org"]
        assert set(notification["phases"]) == {"FAILED", "TIMED_OUT", "ABORTED"}


def test_schedules_are_at_their_local_time_all_year(package: Package) -> None:
    scheduled = {
        name: plan["entityMetadata"]["schedule"]["cronSchedule"]["schedule"]
        for name, plan in package.plans.items()
        if plan.get("entityMetadata", {}).get("schedule")
    }
    assert set(scheduled) == set(SCHEDULES)
    for name, cron in scheduled.items():
        minute, hour, *days = cron.split()
        assert minute == "0"
        assert days[:2] == ["*", "*"]
        at, weekday = SCHEDULES[name]
        for day in range(366):
            utc = datetime.datetime(2027, 1, 1, int(hour), tzinfo=datetime.UTC) + datetime.timedelta(days=day)
            if days[2] != "*" and utc.isoweekday() % 7 != int(days[2]):
                continue
            local = utc.astimezone(ZoneInfo(TIME_ZONE))
            assert local.hour == at, f"{name} on {utc.date()}"
            assert weekday is None or local.weekday() == weekday
            # Training starts in training hours, when its nodes don't serve; other plans run outside of them.
            trains = package.plans[name]["workflowId"]["name"].endswith("training_pipeline")
            assert (local.hour in TRAINING_HOURS) is trains, name


def test_executions_bind_to_what_is_packaged(package: Package) -> None:
    files = sorted((PROJECT / "executions").glob("*.yaml"))
    assert len(files) >= 5
    kinds = {"STRING": str, "INTEGER": int, "FLOAT": float, "BOOLEAN": bool}
    for path in files:
        execution = yaml.safe_load(path.read_text())
        assert set(execution) == {"workflow", "version", "inputs"}, path
        assert execution["version"] == "REVISION", path
        plan = package.plans[execution["workflow"]]
        inputs = package.inputs(plan["workflowId"])
        fixed = set(plan.get("fixedInputs", {}).get("literals", {}))
        defaults = {
            name
            for name, parameter in plan.get("defaultInputs", {}).get("parameters", {}).items()
            if not parameter.get("required")
        }
        assert set(execution["inputs"]) <= set(inputs) - fixed, path
        assert set(inputs) - fixed - defaults <= set(execution["inputs"]), path
        for name, value in execution["inputs"].items():
            assert type(value) is kinds[inputs[name]["type"]["simple"]], f"{path}: {name}"


def test_recipes_in_executions_are_valid() -> None:
    recipes = {
        path.stem: execution["inputs"]["recipe"]
        for path in (PROJECT / "executions").glob("*.yaml")
        if "recipe" in (execution := yaml.safe_load(path.read_text()))["inputs"]
    }
    loaded = {name: load_recipe(recipe) for name, recipe in recipes.items() if not recipe.startswith("s3://")}
    assert loaded["own_recipe"].name == "first-run"
