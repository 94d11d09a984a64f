"""GPUs: those of the cluster's nodes, and those of this machine. Imports no torch until it is needed."""

import contextlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

from forge.cluster.nodes import Node, TrainingShape, nodes_of, training_nodes
from forge.core.errors import ForgeError

GIB = 2**30
RESERVED = 2 * GIB  # per GPU: driver, CUDA context, NCCL buffers, fragmentation


@dataclass(frozen=True)
class GPU:
    """A GPU: its memory as the driver reports it (bytes), and the name that Flyte has for it as an accelerator."""

    name: str
    memory: int
    accelerator: str = ""

    @property
    def usable(self) -> int:
        """Bytes that a training process can fill."""
        return self.memory - RESERVED


# By the product names of infra/nodes.yaml. Memory as nvidia-smi reports it; accelerators as in the node label
# flyte.org/accelerator and in flytekit.extras.accelerators.
GPUS = {
    "A100-40GB": GPU("A100-40GB", 40_960 * 2**20, "nvidia-tesla-a100"),
    "A100-80GB": GPU("A100-80GB", 81_920 * 2**20, "nvidia-a100-80gb"),
    "H100-80GB": GPU("H100-80GB", 81_559 * 2**20, "nvidia-h100"),
    "H200-141GB": GPU("H200-141GB", 143_771 * 2**20, "nvidia-h200"),
}


def gpus_in(node: Node) -> list[GPU]:
    """The GPUs of a node. Raises ForgeError if their product is unknown."""
    if node.gpus is None:
        return []
    if node.gpus.product not in GPUS:
        raise ForgeError(
            f"GPU product {node.gpus.product} is unknown",
            where=f"infra/nodes.yaml: {node.name}",
            fix=f"take one of {', '.join(GPUS)}, or add it to GPUS in forge/cluster/gpus.py",
        )
    return [GPUS[node.gpus.product]] * node.gpus.count


def gpus_of(role: str) -> list[GPU]:
    """The GPUs of the node with the least GPU memory among the cluster's nodes with a role."""
    return min((gpus_in(node) for node in nodes_of(role)), key=lambda gpus: sum(gpu.memory for gpu in gpus))


def on_cluster() -> bool:
    """Whether this process runs in a pod that Flyte started."""
    return "FLYTE_INTERNAL_EXECUTION_ID" in os.environ


def check_gpus_seen(requested: int) -> None:
    """Raise ForgeError if torch sees fewer GPUs than the pod requested, so that no task falls back to fewer, or a CPU.

    `requested` is the setting `gpus`: 0 outside of GPU pods.
    """
    import torch

    seen = torch.cuda.device_count() if requested else 0
    if seen < requested:
        raise ForgeError(
            f"this pod requested {requested}, and torch sees {seen} on {platform.node()}",
            where="GPUs",
            fix="check the driver on the node (nvidia-smi), its device plugin pod, and the runtime class nvidia",
        )


def training_gpus(shape: TrainingShape) -> list[GPU]:
    """The GPUs of a node that trains in this shape: of the cluster's in a pod, else of this machine; empty for a CPU.

    Raises IndexError if no training node of the cluster has enough GPUs (see forge.cluster.nodes.check_cluster_has).
    """
    return gpus_in(training_nodes(shape)[0]) if on_cluster() else find_gpus()


def find_gpus() -> list[GPU]:
    """This machine's GPUs, as far as CUDA_VISIBLE_DEVICES exposes them; empty without a driver or with a CPU torch."""
    import pynvml  # type: ignore[import-untyped]

    if importlib.metadata.version("torch").endswith("+cpu"):
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles: list[Any] = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        chosen = []
        for name in visible.split(","):
            # CUDA ignores the first unknown name and all after it.
            with contextlib.suppress(pynvml.NVMLError, IndexError):
                index = name.strip()
                chosen.append(handles[int(index)] if index.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(index))
                continue
            break
        handles = chosen
    return [GPU(pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
