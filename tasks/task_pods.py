"""The pods that tasks run in on the cluster: image, node, resources, settings and secrets. Local runs ignore them.

Tasks pass what these functions return to flytekit's `@task`. Images are named by `pyflyte register --image` (make
register). Settings come from the namespace's ConfigMap `forge-settings` and Secret `forge-secrets`, so a package
contains none of their values.

Whatever depends on the node list (infra/nodes.yaml) is computed when a task is serialized, so that importing the
workflows and running them on one machine doesn't read it.
"""

import datetime
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flytekit import PodTemplate, PythonFunctionTask, Resources, Secret
from flytekit.configuration import SerializationSettings
from flytekit.core.python_auto_container import PythonAutoContainerTask
from flytekit.core.resources import ResourceSpec, construct_extended_resources
from flytekit.extend import TaskPlugins
from flytekit.extras.accelerators import GPUAccelerator
from kubernetes import client

from forge.cluster.gpus import gpus_in
from forge.cluster.nodes import LIGHT, TRAINING, TRAINING_PRIORITY, Node, TrainingShape, nodes_of, training_nodes
from tasks.flyte_sessions import close_sessions_at_exit

close_sessions_at_exit()

LIGHT_IMAGE = "{{.image.pipeline.fqn}}:{{.image.pipeline.version}}"
TRAINER_IMAGE = "{{.image.trainer.fqn}}:{{.image.trainer.version}}"
SETTINGS, SECRETS = "forge-settings", "forge-secrets"
PRIMARY = "primary"  # the container
HOME = "/var/lib/forge"  # FORGE_HOME in the images
KEYS = "/etc/forge/keys"  # for FORGE_VERIFY_KEY (ConfigMap forge-keys) and FORGE_SIGNING_KEY (Secret forge-keys)
CHECKPOINTS = "forge-training"  # the PersistentVolumeClaim that all nodes of one training mount
USER = 1000  # in the images
# The environment variable for each key of the Secret. All keys are optional.
VARIABLES = {"s3-access-key": "FORGE_S3_ACCESS_KEY", "s3-secret-key": "FORGE_S3_SECRET_KEY", "hf-token": "HF_TOKEN"}
GPU_VARIABLES = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_DEBUG": "WARN",
    "NCCL_SOCKET_IFNAME": "eth0",  # the pod network; otherwise NCCL may pick a bridge that only this node has
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    # Longer than the timeout of a collective (tasks/finetune/process_group.py), which reports what each rank was doing.
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "900",
}
METRICS = 9095  # the port that Prometheus scrapes during training; FORGE_METRICS_PORT in the ConfigMap
SCRATCH = "200Gi"  # of a node's disk, for local copies
ROLLOUT = "forge-rollout"  # ServiceAccount of the tasks that change what is served; no other task gets a token
# Seconds until Kubernetes kills a pod: a training saves and copies its checkpoint, a rollout undoes itself.
GRACE, GRACE_TRAINING, GRACE_ROLLOUT = 60, 660, 300


class NodePod(PodTemplate):
    """A pod template whose spec is built when it is first read, which is when the task is serialized."""

    def __init__(self, build: Callable[[], client.V1PodSpec]) -> None:
        self._build = build
        self.primary_container_name = PRIMARY
        self.labels = {"app.kubernetes.io/part-of": "forge"}
        self.annotations = None

    @functools.cached_property
    def pod_spec(self) -> client.V1PodSpec:
        """The spec, for Flyte to add the container's image, command and resources to."""
        return self._build()


class OnTrainingNodes(PythonAutoContainerTask[Any], ABC):
    """Mixin of tasks on the training nodes: GPUs, and the share of a node's cores and memory that belongs to them."""

    @property
    @abstractmethod
    def shape(self) -> TrainingShape:
        """Nodes, and GPUs per node."""

    @property
    def resources(self) -> ResourceSpec:
        """Cores, memory and GPUs of each pod."""
        gpus = self.shape.nproc_per_node
        cores, memory = training_node(self.shape).share(gpus)
        return ResourceSpec(**_resources(cores, memory, gpu=str(gpus)))

    def get_extended_resources(self, settings: SerializationSettings) -> Any:
        """The accelerator, and shared memory for NCCL and data loaders."""
        node = training_node(self.shape)
        _, memory = node.share(self.shape.nproc_per_node)
        return construct_extended_resources(
            accelerator=GPUAccelerator(gpus_in(node)[0].accelerator), shared_memory=f"{memory // 4}Gi"
        )


@dataclass(frozen=True)
class TrainingNodes:
    """Task configuration: the task function runs once, in a pod on the training nodes."""

    shape: TrainingShape


class GPUTask(OnTrainingNodes, PythonFunctionTask[TrainingNodes]):
    """A Python function in a pod with GPUs."""

    @property
    def shape(self) -> TrainingShape:
        """Nodes, and GPUs per node."""
        return self.task_config.shape


TaskPlugins.register_pythontask_plugin(TrainingNodes, GPUTask)


def light(
    cores: int = 2,
    memory: int = 8,
    hours: float = 1.0,
    signs: bool = False,
    rolls_out: bool = False,
    image: str = LIGHT_IMAGE,
) -> dict[str, Any]:
    """Arguments of `@task` for a pod without GPUs; memory in GiB.

    `signs` mounts the private key, if there is one. `rolls_out` grants the rights to change what is served.
    """
    return {
        "container_image": image,
        "pod_template": NodePod(lambda: pod_spec(nodes_of(LIGHT)[0], signs=signs, rolls_out=rolls_out)),
        **_resources(cores, memory),
        **_common(hours),
    }


def on_gpus(shape: TrainingShape, hours: float) -> dict[str, Any]:
    """Arguments of `@task` for pods on the training nodes, one per node of the shape.

    A task with a `task_config` of its own replaces the one given here, and its class is a subclass of OnTrainingNodes.
    """
    return {
        "task_config": TrainingNodes(shape),
        "container_image": TRAINER_IMAGE,
        "pod_template": NodePod(lambda: pod_spec(training_node(shape), shared=shape.nodes > 1)),
        # A process that sees fewer GPUs than its pod requested fails: see Settings.gpus.
        "environment": {**GPU_VARIABLES, "FORGE_GPUS": str(shape.nproc_per_node)},
        **_common(hours),
    }


def training_node(shape: TrainingShape) -> Node:
    """A node that can train in a shape. If none can, any training node: preflight refuses such a run."""
    return (training_nodes(shape) or nodes_of(TRAINING))[0]


def _resources(cores: int, memory: int, **more: str) -> dict[str, Any]:
    """Requests equal limits, so that nodes are never overcommitted."""
    resources = Resources(cpu=str(cores), mem=f"{memory}Gi", **more)
    return {"requests": resources, "limits": resources}


def _common(hours: float) -> dict[str, Any]:
    kind = Secret.MountType.ENV_VAR
    return {
        "timeout": datetime.timedelta(hours=hours),
        "secret_requests": [
            Secret(group=SECRETS, key=key, env_var=variable, mount_requirement=kind)
            for key, variable in VARIABLES.items()
        ],
    }


def pod_spec(node: Node, signs: bool = False, shared: bool = False, rolls_out: bool = False) -> client.V1PodSpec:
    """Where a pod runs, as which user, and with which volumes: all that Flyte has no option for.

    `shared` puts checkpoints on the volume that all nodes of a training mount.
    """
    mounts = [client.V1VolumeMount(name="home", mount_path=HOME)]
    volumes = [client.V1Volume(name="home", empty_dir=client.V1EmptyDirVolumeSource(size_limit=SCRATCH))]
    keys = [client.V1VolumeProjection(config_map=client.V1ConfigMapProjection(name="forge-keys", optional=True))]
    if signs:
        keys.append(client.V1VolumeProjection(secret=client.V1SecretProjection(name="forge-keys", optional=True)))
    mounts.append(client.V1VolumeMount(name="keys", mount_path=KEYS, read_only=True))
    volumes.append(client.V1Volume(name="keys", projected=client.V1ProjectedVolumeSource(sources=keys)))
    if shared:
        claim = client.V1PersistentVolumeClaimVolumeSource(claim_name=CHECKPOINTS)
        volumes.append(client.V1Volume(name="shared", persistent_volume_claim=claim))
        mounts += [
            client.V1VolumeMount(name="shared", mount_path=f"{HOME}/{folder}", sub_path=folder)
            for folder in ("checkpoints", "failures")
        ]
    settings = client.V1EnvFromSource(config_map_ref=client.V1ConfigMapEnvSource(name=SETTINGS))
    container = client.V1Container(
        name=PRIMARY,
        env_from=[settings],
        ports=[client.V1ContainerPort(name="metrics", container_port=METRICS)] if node.gpus else None,
        volume_mounts=mounts,
        security_context=client.V1SecurityContext(
            allow_privilege_escalation=False, capabilities=client.V1Capabilities(drop=["ALL"])
        ),
    )
    return client.V1PodSpec(
        containers=[container],
        volumes=volumes,
        node_selector=node.selector,
        tolerations=[
            client.V1Toleration(key=taint.key, operator="Equal", value=taint.value, effect=taint.effect)
            for taint in node.taints
        ],
        runtime_class_name="nvidia" if node.gpus else None,
        priority_class_name=TRAINING_PRIORITY if node.gpus else None,
        enable_service_links=False,
        service_account_name=ROLLOUT if rolls_out else None,
        automount_service_account_token=rolls_out,
        termination_grace_period_seconds=GRACE_TRAINING if node.gpus else GRACE_ROLLOUT if rolls_out else GRACE,
        security_context=client.V1PodSecurityContext(
            run_as_non_root=True, run_as_user=USER, run_as_group=USER, fs_group=USER,
            seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
        ),
    )  # fmt: skip
