"""What `make package` leaves, read back as Flyte's admin would read it."""

import datetime
import importlib
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from flyteidl.admin.launch_plan_pb2 import LaunchPlan
from flyteidl.admin.task_pb2 import TaskSpec
from flyteidl.admin.workflow_pb2 import WorkflowSpec
from flytekit import HashMethod
from google.protobuf.json_format import MessageToDict

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
from forge.storage.recipes import RECIPES
from tasks.finetune.task import ENVIRONMENT

PROJECT = Path(__file__).parents[2]
SECRETS = {
    "FORGE_S3_ACCESS_KEY": "an-access-key-9f2c",
    "FORGE_S3_SECRET_KEY": "a-secret-key-41d7",
    "HF_TOKEN": "hf_c3d9",
}
PLACES = {"FORGE_STORE": "s3://forge/store", "FORGE_NOTIFY": "ml@example.org, night@example.org"}
KINDS = {"1": TaskSpec, "2": WorkflowSpec, "3": LaunchPlan}
GPU_TASKS = {"evaluate_model", *(f"train_on_{shape}" for shape in SHAPES)}
# Of what is scheduled: hour and weekday (Monday is 0; None: every day) in the cluster's time zone.
LOCAL = {
    "nightly_fine_tune": (7, None),
    "weekly_champion_check": (19, 6),
    "registry_retention": (6, 6),
}


class Package:
    """Tasks, workflows and launch plans by name, as JSON has them."""

    def __init__(self, path: Path) -> None:
        self.found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self.names: list[tuple[str, str]] = []
        self.bytes = b""
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                data = archive.extractfile(member)
                kind = member.name.removesuffix(".pb")[-1]
                if data is None or kind not in KINDS:
                    continue
                raw = data.read()
                self.bytes += raw
                entity = MessageToDict(KINDS[kind].FromString(raw))
                name = (entity if kind == "3" else entity["template"])["id"]["name"]
                self.names.append((kind, name))
                self.found[kind][name] = entity
        self.tasks = {name: entity["template"] for name, entity in self.found["1"].items()}
        self.workflows = {name: entity["template"] for name, entity in self.found["2"].items()}
        self.plans = {name: entity["spec"] for name, entity in self.found["3"].items()}

    def inputs(self, reference: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a task or a workflow that something refers to."""
        interfaces = {**self.tasks, **self.workflows}
        return dict(interfaces[reference["name"]]["interface"].get("inputs", {}).get("variables", {}))

    def nodes(self, within: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """Each node of each workflow, or of one, that runs something, those within branches too."""
        for name, workflow in self.workflows.items():
            if within not in ("", name):
                continue
            waiting = [*workflow["nodes"], *([workflow["failureNode"]] if "failureNode" in workflow else [])]
            while waiting:
                node = waiting.pop()
                if branch := node.get("branchNode", {}).get("ifElse"):
                    cases = [branch["case"], *branch.get("other", [])]
                    waiting += [case["thenNode"] for case in cases]
                    waiting += [branch["elseNode"]] if "elseNode" in branch else []
                elif node["id"] not in ("start-node", "end-node"):
                    yield name, node


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


def short(name: str) -> str:
    return name.rpartition(".")[2]


def pod_of(task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A task's pod, and its one container."""
    spec = task["k8sPod"]["podSpec"]
    (container,) = spec["containers"]
    return spec, container


def quantity(text: str) -> int:
    """Of Kubernetes: cores, GPUs, or GiB."""
    return int(text.removesuffix("Gi"))


def test_no_two_entities_have_the_same_name(package: Package) -> None:
    assert len(package.names) > 30
    assert len(set(package.names)) == len(package.names)


def test_images_are_pinned_and_only_those_that_need_torch_are_large(package: Package) -> None:
    for name, task in package.tasks.items():
        image = "trainer" if short(name) in {*GPU_TASKS, "preflight"} else "pipeline"
        assert pod_of(task)[1]["image"] == f"example.org/forge/forge-{image}:0123456789ab", name


def test_each_pod_fits_its_nodes_and_is_let_onto_them(package: Package) -> None:
    for name, task in package.tasks.items():
        spec, container = pod_of(task)
        wanted = container["resources"]["requests"]
        assert wanted == container["resources"]["limits"], name
        gpus = quantity(wanted.get("gpu", "0"))
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
            assert quantity(wanted["cpu"]) <= node.cores - KEPT_CORES, name
            assert quantity(wanted["memory"]) <= node.memory_gib - KEPT_MEMORY, name
            assert gpus <= (node.gpus.count if node.gpus else 0), name
            assert [(one.key, one.value, one.effect) for one in node.taints] == tolerated, name


def test_two_pods_of_half_a_node_fit_it_together(package: Package) -> None:
    half = pod_of(package.tasks["tasks.finetune.task.train_on_1x1"])[1]["resources"]["requests"]
    node = nodes_of(TRAINING)[0]
    assert 2 * quantity(half["cpu"]) <= node.cores - KEPT_CORES
    assert 2 * quantity(half["memory"]) <= node.memory_gib - KEPT_MEMORY


def test_what_trains_in_which_shape(package: Package) -> None:
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
            assert claims == [{"claimName": "forge-training"}], "where all nodes see the checkpoints"


def test_gpus_have_shared_memory_and_are_the_nodes_own(package: Package) -> None:
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


def test_settings_and_secrets_are_there_by_reference_alone(package: Package) -> None:
    for value in SECRETS.values():
        assert value.encode() not in package.bytes
    for name, task in package.tasks.items():
        secrets = {one["envVar"]: (one["group"], one["mountRequirement"]) for one in task["securityContext"]["secrets"]}
        assert secrets == dict.fromkeys(SECRETS, ("forge-secrets", "ENV_VAR")), name
        container = pod_of(task)[1]
        assert container["envFrom"] == [{"configMapRef": {"name": "forge-settings"}}], name
        # What a pod says of itself; all that says where things are comes from the ConfigMap.
        ours = [one["name"] for one in container.get("env", []) if one["name"].startswith("FORGE_")]
        assert ours == (["FORGE_GPUS"] if short(name) in GPU_TASKS else []), name


def test_pods_are_of_an_ordinary_user(package: Package) -> None:
    for name, task in package.tasks.items():
        spec, container = pod_of(task)
        # What the level `restricted` of Pod Security asks for, which the namespaces of tasks have.
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"], name
        kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "projected", "persistentVolumeClaim"}, name
        assert spec["enableServiceLinks"] is False, name


def test_only_what_rolls_out_may_ask_the_api_server(package: Package) -> None:
    for name, task in package.tasks.items():
        spec, _ = pod_of(task)
        rolls_out = short(name) in ("roll_out", "roll_back")
        assert spec["automountServiceAccountToken"] is rolls_out, name
        assert spec.get("serviceAccountName", "") == ("forge-rollout" if rolls_out else ""), name


def test_pods_have_the_time_that_their_code_takes_to_end(package: Package) -> None:
    for name, task in package.tasks.items():
        seconds = int(pod_of(task)[0]["terminationGracePeriodSeconds"])
        # As long as a checkpoint and its copy may take, and half a minute for the rest.
        least = int(ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 30 if "train_on" in name else 60
        assert seconds >= least, name


def sources(package: Package, workflow: str, binding: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The tasks and outputs that a node's input comes from, through sub-workflows; it must be whole all the way."""
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


def test_cached_tasks_take_whole_outputs_with_a_hash_of_their_own(package: Package) -> None:
    """Flyte encodes an attribute of an output anew in each execution, its keys in another order: no cache would hit."""
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


def test_training_is_tried_again_and_what_is_done_is_kept(package: Package) -> None:
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
    assert seen >= {"preflight", "train_on_2x2", "release", "roll_out", "hold_back", "tell_failure", "check_champion"}


def test_stages_are_nodes_that_one_knows_by_name(package: Package) -> None:
    pipeline = package.workflows["workflows.training_pipeline.training_pipeline"]
    names = [node["id"] for node in pipeline["nodes"]]
    assert {"preflight", "preprocess", "train", "evaluate"} <= set(names)


def test_plans_run_once_at_a_time_and_people_hear_of_failures(package: Package) -> None:
    plans = {name: plan for name, plan in package.plans.items() if not name.startswith("workflows.")}
    assert set(plans) == {*LOCAL, *(f"train_{path.stem}" for path in RECIPES.glob("*.yaml"))}
    for name, plan in plans.items():
        assert plan["concurrencyPolicy"] == {"max": 1, "behavior": "CONCURRENCY_LIMIT_BEHAVIOR_SKIP"}
        assert plan["maxParallelism"] == 8
        assert plan["labels"]["values"]["forge/plan"] == name
        assert plan["rawOutputDataConfig"]["outputLocationPrefix"] == "s3://forge/store/flyte"
        (told,) = plan["entityMetadata"]["notifications"]
        assert told["email"]["recipientsEmail"] == ["ml@example.org", "night@example.org"]
        assert set(told["phases"]) == {"FAILED", "TIMED_OUT", "ABORTED"}


def test_schedules_are_at_their_local_time_all_year(package: Package) -> None:
    scheduled = {
        name: plan["entityMetadata"]["schedule"]["cronSchedule"]["schedule"]
        for name, plan in package.plans.items()
        if plan.get("entityMetadata", {}).get("schedule")
    }
    assert set(scheduled) == set(LOCAL)
    for name, cron in scheduled.items():
        minute, hour, *days = cron.split()
        assert minute == "0"
        assert days[:2] == ["*", "*"]
        at, weekday = LOCAL[name]
        for day in range(366):
            utc = datetime.datetime(2027, 1, 1, int(hour), tzinfo=datetime.UTC) + datetime.timedelta(days=day)
            if days[2] != "*" and utc.isoweekday() % 7 != int(days[2]):
                continue
            local = utc.astimezone(ZoneInfo(TIME_ZONE))
            assert local.hour == at, f"{name} on {utc.date()}"
            assert weekday is None or local.weekday() == weekday
            # What trains begins in the hours in which its GPUs serve nobody, and what asks the server outside of them.
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
