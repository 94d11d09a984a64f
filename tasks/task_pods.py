"""The pods that tasks run in on the cluster: image, node, resources, settings and secrets. Of no effect elsewhere.

Doors give their tasks what these functions return. Images are named by `pyflyte register --image` (make register). The
settings come from the ConfigMap `forge-settings` and the Secret `forge-secrets` of the namespace, so that a package
holds none of their values.
"""

import datetime
from typing import Any

from flytekit import PodTemplate, Resources, Secret
from flytekit.extras.accelerators import A100
from kubernetes import client

from forge.cluster.nodes import LIGHT, TRAINING, Node, TrainingShape, nodes_of
from tasks.flyte_sessions import close_sessions_at_exit

close_sessions_at_exit()

LIGHT_IMAGE = "{{.image.pipeline.fqn}}:{{.image.pipeline.version}}"
TRAINER_IMAGE = "{{.image.trainer.fqn}}:{{.image.trainer.version}}"
SETTINGS, SECRETS = "forge-settings", "forge-secrets"
PRIMARY = "primary"  # the container
HOME = "/var/lib/forge"  # FORGE_HOME in the images
KEYS = "/etc/forge/keys"  # for FORGE_VERIFY_KEY (ConfigMap forge-keys) and FORGE_SIGNING_KEY (Secret forge-keys)
CHECKPOINTS = "forge-training"  # the volume that the nodes of one training share
USER = 1000  # in the images
# What a key of the Secret is to a task; those that are not there are left out.
VARIABLES = {"s3-access-key": "FORGE_S3_ACCESS_KEY", "s3-secret-key": "FORGE_S3_SECRET_KEY", "hf-token": "HF_TOKEN"}
GPU_VARIABLES = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_DEBUG": "WARN",
    "NCCL_SOCKET_IFNAME": "eth0",  # the pods' network; else NCCL may take a bridge that only this node has
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    # Longer than a collective may take (tasks/finetune/process_group.py), which then says what was going on.
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "900",
}
PRIORITY = "forge-training"  # below what serves, above notebooks (infra/apps/cluster/priority-classes)
METRICS = 9095  # that Prometheus asks a training on, as FORGE_METRICS_PORT of the ConfigMap says
SCRATCH = "200Gi"  # of a node's disk, for local copies
ROLLOUT = "forge-rollout"  # the ServiceAccount of the tasks that change what is served; no other task has a token
# Seconds that a pod has to end in: a training to save and copy its checkpoint, a rollout to undo itself.
GRACE, GRACE_TRAINING, GRACE_ROLLOUT = 60, 660, 300


def light(
    cores: int = 2,
    memory: int = 8,
    hours: float = 1.0,
    signs: bool = False,
    rolls_out: bool = False,
    image: str = LIGHT_IMAGE,
) -> dict[str, Any]:
    """A pod without a GPU, with so many cores and GiB.

    `signs` gives it the private key, where there is one, and `rolls_out` the rights to change what is served.
    """
    return {
        "container_image": image,
        "pod_template": pod(nodes_of(LIGHT)[0], signs=signs, rolls_out=rolls_out),
        **_resources(cores, memory),
        **_common(hours),
    }


def on_gpus(shape: TrainingShape, hours: float) -> dict[str, Any]:
    """Pods of the training nodes, one for each node of the shape: with its GPUs, and the share of the node they are."""
    node = nodes_of(TRAINING)[0]
    cores, memory = node.share(shape.nproc_per_node)
    return {
        "container_image": TRAINER_IMAGE,
        "pod_template": pod(node, shared=shape.nodes > 1),
        "accelerator": A100,
        "shared_memory": f"{memory // 4}Gi",  # NCCL's, and of data loaders
        # A process that sees fewer GPUs than its pod has asked for ends with an error: see Settings.gpus.
        "environment": {**GPU_VARIABLES, "FORGE_GPUS": str(shape.nproc_per_node)},
        **_resources(cores, memory, gpu=str(shape.nproc_per_node)),
        **_common(hours),
    }


def _resources(cores: int, memory: int, **more: str) -> dict[str, Any]:
    """Requests and limits are the same: a node is never promised twice."""
    wanted = Resources(cpu=str(cores), mem=f"{memory}Gi", **more)
    return {"requests": wanted, "limits": wanted}


def _common(hours: float) -> dict[str, Any]:
    kind = Secret.MountType.ENV_VAR
    return {
        "timeout": datetime.timedelta(hours=hours),
        "secret_requests": [
            Secret(group=SECRETS, key=key, env_var=variable, mount_requirement=kind)
            for key, variable in VARIABLES.items()
        ],
    }


def pod(node: Node, signs: bool = False, shared: bool = False, rolls_out: bool = False) -> PodTemplate:
    """What Flyte's own options do not say of a pod: where it runs, as whom, and what is mounted.

    `shared` puts checkpoints on the volume that all nodes of a training see.
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
    spec = client.V1PodSpec(
        containers=[container],
        volumes=volumes,
        node_selector={"role": node.role, **({"gpu-type": "nvidia"} if node.gpus else {})},
        tolerations=[
            client.V1Toleration(key=taint.key, operator="Equal", value=taint.value, effect=taint.effect)
            for taint in node.taints
        ],
        runtime_class_name="nvidia" if node.gpus else None,
        priority_class_name=PRIORITY if node.gpus else None,
        enable_service_links=False,
        service_account_name=ROLLOUT if rolls_out else None,
        automount_service_account_token=rolls_out,
        termination_grace_period_seconds=GRACE_TRAINING if node.gpus else GRACE_ROLLOUT if rolls_out else GRACE,
        security_context=client.V1PodSecurityContext(
            run_as_non_root=True, run_as_user=USER, run_as_group=USER, fs_group=USER,
            seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
        ),
    )  # fmt: skip
    return PodTemplate(pod_spec=spec, primary_container_name=PRIMARY, labels={"app.kubernetes.io/part-of": "forge"})
