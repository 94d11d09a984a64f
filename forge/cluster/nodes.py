"""The cluster's nodes, as infra/nodes.yaml lists them, and the shapes of training that there are. Imports no torch."""

import functools
from dataclasses import dataclass
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from forge.core.errors import ForgeError
from forge.core.settings import shipped

FILE = shipped("infra/nodes.yaml")
TRAINING, SERVING, LIGHT = "training", "inference", "ml-platform"  # roles: where what runs
# The GPUs of the training nodes train in the day of the cluster's people, and may serve those of other continents in
# their night.
TIME_ZONE = "America/Sao_Paulo"
TRAINING_HOURS = range(7, 19)
KEPT_CORES, KEPT_MEMORY = 4, 16  # of a node, for k3s and what runs on every node (GiB)


class NodeListEntry(BaseModel):
    """Of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Taint(NodeListEntry):
    """What keeps pods away that do not tolerate it."""

    key: str
    value: str
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class GPUs(NodeListEntry):
    """The GPUs of a node; `product` is one of forge.capacity.training_memory.GPUS."""

    count: int = Field(ge=1)
    product: str


class Node(NodeListEntry):
    """A machine. Its labels are its role, its pool, and those listed."""

    name: str
    role: str
    pool: str = ""
    cores: int = Field(ge=1)
    memory_gib: int = Field(ge=1)
    disk_gb: int = Field(ge=1)
    gpus: GPUs | None = None
    labels: dict[str, str] = {}
    taints: tuple[Taint, ...] = ()

    def share(self, gpus: int) -> tuple[int, int]:
        """The cores and the memory (GiB) that belong to so many of its GPUs."""
        count = self.gpus.count if self.gpus else 1
        return (self.cores - KEPT_CORES) * gpus // count, (self.memory_gib - KEPT_MEMORY) * gpus // count


@dataclass(frozen=True)
class TrainingShape:
    """How many nodes train, with how many processes (and GPUs) each."""

    nodes: int
    nproc_per_node: int

    def __str__(self) -> str:
        return f"{self.nodes}x{self.nproc_per_node}"


# One door of fine-tuning each: Flyte cannot change how many nodes a registered task has.
SHAPES = (TrainingShape(1, 1), TrainingShape(1, 2), TrainingShape(2, 2))


@functools.cache
def all_nodes() -> tuple[Node, ...]:
    """The list; pydantic's ValidationError where it is wrong."""
    return tuple(Node.model_validate(node) for node in yaml.safe_load(FILE.read_text(encoding="utf-8"))["nodes"])


def nodes_of(role: str) -> list[Node]:
    """The nodes of a role, of which there is at least one."""
    return [node for node in all_nodes() if node.role == role]


def find_shape(nodes: int, nproc_per_node: int) -> TrainingShape:
    """The shape of a recipe; ForgeError where there is no such door."""
    shape = TrainingShape(nodes, nproc_per_node)
    if shape not in SHAPES:
        raise ForgeError(
            f"training.nodes {nodes} with training.nproc_per_node {nproc_per_node}: there is no such shape; "
            f"take one of {', '.join(map(str, SHAPES))} (nodes x processes)"
        )
    return shape


def check_cluster_has(shape: TrainingShape) -> None:
    """ForgeError where the nodes that train have too few GPUs for a shape."""
    able = [node for node in nodes_of(TRAINING) if node.gpus and node.gpus.count >= shape.nproc_per_node]
    if len(able) < shape.nodes:
        raise ForgeError(
            f"training.nodes {shape.nodes} with training.nproc_per_node {shape.nproc_per_node}: {len(able)} of the "
            f"cluster's nodes of role {TRAINING} have so many GPUs (infra/nodes.yaml); lower training.nodes or "
            "training.nproc_per_node"
        )
