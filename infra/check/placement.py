"""Check that every pod fits a node: GPUs, cores and memory, by day and by night, even while all pods are replaced."""

import datetime
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal

from kubernetes.utils import parse_quantity

from forge.cluster.gpus import GIB
from forge.cluster.nodes import (
    SHAPES,
    TIME_ZONE,
    TRAINING,
    TRAINING_HOURS,
    TRAINING_PRIORITY,
    Node,
    TrainingShape,
    training_nodes,
)
from infra.check.tree import Object, Pod, Tree

GPU = "nvidia.com/gpu"
# What the kubelet reserves on each node for the system (infra/k3s). Tasks leave more, for DaemonSets
# (forge.cluster.nodes.KEPT_CORES).
RESERVED_CORES, RESERVED_MEMORY = 2, 8
MAY_WAIT = "forge-notebooks"  # the priority class of pods that may stay pending
OS = {"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "nvidia.com/gpu.present": "true"}


@dataclass
class NodeCapacity:
    """A node and its unused cores, memory and GPUs."""

    node: Node
    cores: Decimal
    memory: Decimal
    gpus: Decimal
    pods: list[str] = field(default_factory=list)

    def takes(self, pod: Pod, need: tuple[Decimal, Decimal, Decimal]) -> bool:
        """Whether a pod tolerates the node, selects it, and fits."""
        labels = {"role": self.node.role, **({"pool": self.node.pool} if self.node.pool else {}), **self.node.labels}
        labels |= {name: value for name, value in OS.items() if "gpu" not in name or self.node.gpus}
        selector = (pod.spec.get("nodeSelector") or {}).items()
        taints = [taint.model_dump() for taint in self.node.taints]
        if self.node.role == "control-plane":
            taints.append({"key": "node-role.kubernetes.io/control-plane", "value": "true", "effect": "NoSchedule"})
        fits = need[0] <= self.cores and need[1] <= self.memory and need[2] <= self.gpus
        return fits and selector <= labels.items() and all(_tolerates(pod.spec, taint) for taint in taints)

    def put(self, pod: Pod, need: tuple[Decimal, Decimal, Decimal]) -> None:
        """Place a pod here."""
        self.cores, self.memory, self.gpus = (
            self.cores - need[0], self.memory - need[1], self.gpus - need[2],
        )  # fmt: skip
        self.pods.append(pod.where)


def _tolerates(spec: Object, taint: dict[str, str]) -> bool:
    return any(
        one.get("key") in (None, taint["key"])
        and (one.get("operator") == "Exists" or one.get("value") == taint["value"])
        and one.get("effect") in (None, taint["effect"])
        for one in spec.get("tolerations") or []
    )


def check_placement(tree: Tree) -> Iterator[str]:
    """Report pods that fit no node, by day or by night."""
    try:
        nodes = nodes_of_tree(tree)
    except ValueError as error:
        yield f"infra/nodes.yaml: {' '.join(str(error).split())}"
        return
    day, night = pods_at(tree, TRAINING_HOURS[0] + 1), pods_at(tree, TRAINING_HOURS[-1] + 2)
    by_day = [finding for shape in SHAPES for finding in place(nodes, day, [shape])[1]]
    yield from (f"{finding} (by day)" for finding in dict.fromkeys(by_day))
    yield from (f"{finding} (by night)" for finding in place(nodes, night, [])[1])
    yield from _windows(tree)


def nodes_of_tree(tree: Tree) -> list[Node]:
    """The node list of a tree. Raises ValueError if it is wrong."""
    return [Node.model_validate(one) for one in tree.lists["nodes"]]


def pods_at(tree: Tree, hour: int) -> list[Pod]:
    """The pods that run at an hour in the cluster's time zone, with the replicas of their schedule."""
    found = []
    for pod in tree.pods:
        replicas = pod.replicas
        for _, one in tree.of("ScaledObject"):
            name = f"{one['spec']['scaleTargetRef'].get('kind', 'Deployment')} {one['spec']['scaleTargetRef']['name']}"
            if one["metadata"]["namespace"] == pod.namespace and pod.where.endswith(f": {name}"):
                replicas = one["spec"].get("minReplicaCount", 0)
                for trigger in one["spec"]["triggers"]:
                    if trigger["type"] == "cron" and hour in hours(trigger["metadata"]):
                        replicas = max(replicas, int(trigger["metadata"]["desiredReplicas"]))
        by_hand = any(
            one["rule"] == "by-hand" and pod.where.startswith(one["where"]) for one in tree.lists["exceptions"]
        )
        if replicas and not by_hand:
            found.append(Pod(**{**pod.__dict__, "replicas": replicas}))
    return found


def hours(window: dict[str, str]) -> set[int]:
    """The hours during which a cron trigger asks for replicas."""
    start, end = (int(window[name].split()[1]) for name in ("start", "end"))
    last = end + (1 if int(window["end"].split()[0]) else 0)  # the last hour counts if it is only partly in the window
    return {hour % 24 for hour in range(start, last if last > start else last + 24)}


def place(nodes: list[Node], pods: list[Pod], trainings: list[TrainingShape]) -> tuple[list[NodeCapacity], list[str]]:
    """Place all pods, and trainings with the resources of tasks/task_pods.py; returns the nodes and what did not fit.

    Largest pods first, each on the fullest node that takes it, as a bin-packing scheduler does.
    """
    placed = [
        NodeCapacity(node, Decimal(node.cores - RESERVED_CORES), Decimal((node.memory_gib - RESERVED_MEMORY) * GIB),
             Decimal(node.gpus.count if node.gpus else 0))
        for node in nodes
    ]  # fmt: skip
    findings = []
    for pod in [one for one in pods if one.kind == "DaemonSet"]:
        need = needed(pod)
        for node in placed:
            if node.takes(pod, (Decimal(0), Decimal(0), Decimal(0))):
                if not node.takes(pod, need):
                    findings.append(f"{pod.where}: does not fit {node.node.name}")
                node.put(pod, need)
    single = [(pod, needed(pod)) for pod in pods if pod.kind != "DaemonSet" for _ in range(pod.replicas + pod.surge)]
    single += [one for shape in trainings for one in _training(nodes, shape)]
    for pod, need in sorted(single, key=lambda one: (one[1][2], one[1][1], one[1][0]), reverse=True):
        able = [node for node in placed if node.takes(pod, need)]
        if able:
            min(able, key=lambda node: (node.gpus, node.memory)).put(pod, need)
        elif pod.spec.get("priorityClassName") != MAY_WAIT:
            what = f"{need[2]} GPUs, {need[0]} cores, {need[1] / GIB:.0f} GiB"
            findings.append(
                f"{pod.where}: no node has room for it ({what}), or none matches its selector and tolerations"
            )
    return placed, findings


def _training(nodes: list[Node], shape: TrainingShape) -> list[tuple[Pod, tuple[Decimal, Decimal, Decimal]]]:
    node = next(iter(training_nodes(shape, nodes)), None) or next(one for one in nodes if one.role == TRAINING)
    cores, memory = node.share(shape.nproc_per_node)
    spec = {
        "nodeSelector": node.selector,
        "tolerations": [{"key": one.key, "value": one.value, "effect": one.effect} for one in node.taints],
        "priorityClassName": TRAINING_PRIORITY,
    }
    pod = Pod(f"a training of shape {shape}", "homelab-production", {}, {}, spec, "PyTorchJob")
    return [(pod, (Decimal(cores), Decimal(memory * GIB), Decimal(shape.nproc_per_node)))] * shape.nodes


def needed(pod: Pod) -> tuple[Decimal, Decimal, Decimal]:
    """Cores, bytes and GPUs that a pod requests: the sum of its containers, or its largest init container if larger."""
    total, init = [Decimal(0)] * 3, [Decimal(0)] * 3
    for container in pod.containers:
        total = [a + b for a, b in zip(total, _requests(container), strict=True)]
    for container in pod.spec.get("initContainers", []):
        init = [max(a, b) for a, b in zip(init, _requests(container), strict=True)]
    cores, memory, gpus = (max(a, b) for a, b in zip(total, init, strict=True))
    return cores, memory, gpus


def _requests(container: Object) -> tuple[Decimal, Decimal, Decimal]:
    resources = container.get("resources") or {}
    requests = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    cores, memory, gpus = (parse_quantity(requests.get(name, 0)) for name in ("cpu", "memory", GPU))
    return cores, memory, gpus


def _windows(tree: Tree) -> Iterator[str]:
    """Report pods that a schedule runs on training nodes during training hours."""
    zone = zoneinfo.ZoneInfo(TIME_ZONE)
    for where, one in tree.of("ScaledObject"):
        for trigger in one["spec"]["triggers"]:
            if trigger["type"] != "cron":
                continue
            window = trigger["metadata"]
            offset = datetime.datetime(2026, 1, 1, tzinfo=zone).utcoffset()
            if datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo(window["timezone"])).utcoffset() != offset:
                yield f"{where}: the time zone {window['timezone']} is not {TIME_ZONE}"
            both = sorted(hours(window) & set(TRAINING_HOURS))
            name = one["spec"]["scaleTargetRef"]["name"]
            on_training = any(
                pod.where.endswith(f" {name}") and (pod.spec.get("nodeSelector") or {}).get("role") == TRAINING
                for pod in tree.pods
            )
            if both and on_training:
                yield f"{where}: runs at {both[0]}:00 in {TIME_ZONE}, during training hours (forge/cluster/nodes.py)"
