"""The cluster's nodes (infra/nodes.yaml) and the shapes that training runs in. Imports no torch.

The file is read on first use, never on import: a run on one machine does not need it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forge.core.errors import ForgeError
from forge.core.settings import shipped

FILE = "infra/nodes.yaml"
TRAINING, SERVING, LIGHT = "training", "inference", "ml-platform"  # node roles
TRAINING_PRIORITY = "forge-training"  # PriorityClass: below serving, above notebooks
# The GPUs of the training nodes train during the day of the cluster's users. At night they may serve users of other
# continents.
TIME_ZONE = "America/Sao_Paulo"
TRAINING_HOURS = range(7, 19)
KEPT_CORES, KEPT_MEMORY = 4, 16  # per node, for k3s and the DaemonSets (GiB)


class NodeListEntry(BaseModel):
    """Base of the entries of infra/nodes.yaml: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Taint(NodeListEntry):
    """A Kubernetes taint."""

    key: str
    value: str
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class GPUs(NodeListEntry):
    """The GPUs of a node. `product` is a key of forge.cluster.gpus.GPUS."""

    count: int = Field(ge=1)
    product: str


class Node(NodeListEntry):
    """A machine. Its node labels are its role, its pool, and `labels`."""

    name: str
    role: str
    pool: str = ""
    cores: int = Field(ge=1)
    memory_gib: int = Field(ge=1)
    disk_gb: int = Field(ge=1)
    gpus: GPUs | None = None
    labels: dict[str, str] = {}
    taints: tuple[Taint, ...] = ()

    @property
    def selector(self) -> dict[str, str]:
        """The node selector of pods that run on nodes like this one."""
        return {"role": self.role, **({"gpu-type": "nvidia"} if self.gpus else {})}

    def share(self, gpus: int) -> tuple[int, int]:
        """Cores and memory (GiB) for a pod that takes this many of the node's GPUs; at most all of the node's."""
        count = self.gpus.count if self.gpus else 1
        gpus = min(gpus, count)
        return (self.cores - KEPT_CORES) * gpus // count, (self.memory_gib - KEPT_MEMORY) * gpus // count


@dataclass(frozen=True)
class TrainingShape:
    """The number of nodes that train, and of processes (each with one GPU) per node."""

    nodes: int
    nproc_per_node: int

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.nproc_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.nproc_per_node}"


# The shapes that can run on the cluster. Each has a Flyte task of its own (tasks/finetune/task.py), since Flyte can't
# change the number of nodes of a registered task. To add a shape, add it here; its nodes are in infra/nodes.yaml.
SHAPES = (
    TrainingShape(1, 1),
    TrainingShape(1, 2),
    TrainingShape(2, 2),
)


@functools.cache
def all_nodes() -> tuple[Node, ...]:
    """Read the node list. Raises ForgeError if it is missing or wrong."""
    path = shipped(FILE)
    try:
        return tuple(Node.model_validate(node) for node in yaml.safe_load(path.read_text(encoding="utf-8"))["nodes"])
    except (OSError, ValidationError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ForgeError(f"is no list of nodes ({' '.join(str(error).split())})", where=str(path)) from None


def nodes_of(role: str) -> list[Node]:
    """The nodes with a role."""
    return [node for node in all_nodes() if node.role == role]


def training_nodes(shape: TrainingShape, nodes: Sequence[Node] | None = None) -> list[Node]:
    """The training nodes with enough GPUs for a shape, all with the same product; those with the fewest GPUs if several
    products would do. Fewer than `shape.nodes` if the cluster can't hold the shape.

    `nodes` is the whole list; the default is infra/nodes.yaml.
    """
    able = sorted(
        (node for node in (all_nodes() if nodes is None else nodes) if node.role == TRAINING and _holds(node, shape)),
        key=lambda node: node.gpus.count if node.gpus else 0,
    )
    products = dict.fromkeys(node.gpus.product for node in able if node.gpus)
    groups = [[node for node in able if node.gpus and node.gpus.product == product] for product in products]
    return next((group for group in groups if len(group) >= shape.nodes), groups[0] if groups else [])


def _holds(node: Node, shape: TrainingShape) -> bool:
    return node.gpus is not None and node.gpus.count >= shape.nproc_per_node


def find_shape(nodes: int, nproc_per_node: int) -> TrainingShape:
    """The shape of a recipe. Raises ForgeError if it is not in SHAPES."""
    shape = TrainingShape(nodes, nproc_per_node)
    if shape not in SHAPES:
        raise ForgeError(
            "the cluster has no Flyte task for this shape",
            where=_fields(shape),
            fix=f"take one of {', '.join(map(str, SHAPES))} (nodes x processes per node), or add it to SHAPES in "
            "forge/cluster/nodes.py and register the workflows again",
        )
    return shape


def check_cluster_has(shape: TrainingShape) -> None:
    """Raise ForgeError if too few training nodes have enough GPUs for a shape."""
    able = len(training_nodes(shape))
    if able < shape.nodes:
        raise ForgeError(
            f"{able} of the cluster's nodes of role {TRAINING} have {shape.nproc_per_node} GPUs (infra/nodes.yaml)",
            where=_fields(shape),
            fix="lower training.nodes or training.nproc_per_node",
        )


def _fields(shape: TrainingShape) -> str:
    return f"training.nodes {shape.nodes} with training.nproc_per_node {shape.nproc_per_node}"
