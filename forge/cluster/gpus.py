"""GPUs: those of the cluster's nodes, and those of this machine. Imports no torch until asked."""

import contextlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

from forge.cluster.nodes import TRAINING, nodes_of
from forge.core.errors import ForgeError

GIB = 2**30
RESERVED = 2 * GIB  # of a GPU: what the driver keeps, CUDA's context, NCCL's buffers, fragmentation


@dataclass(frozen=True)
class GPU:
    """A GPU: its memory as the driver reports it (bytes), and its peak of dense bf16 products (operations a second)."""

    name: str
    memory: int
    flops: float | None = None

    @property
    def usable(self) -> int:
        """Bytes that a training process can fill."""
        return self.memory - RESERVED


# Memory as nvidia-smi reports it; peaks of the SXM modules, from NVIDIA's data sheets (without sparsity).
GPUS = {
    "A100-40GB": GPU("A100-40GB", 40_960 * 2**20, 312e12),
    "A100-80GB": GPU("A100-80GB", 81_920 * 2**20, 312e12),
    "H100-80GB": GPU("H100-80GB", 81_559 * 2**20, 989e12),
    "H200-141GB": GPU("H200-141GB", 143_771 * 2**20, 989e12),
}


def gpus_of(role: str) -> list[GPU]:
    """The GPUs of the smallest of the cluster's nodes of a role."""
    found = [[GPUS[node.gpus.product]] * node.gpus.count if node.gpus else [] for node in nodes_of(role)]
    return min(found, key=lambda gpus: sum(gpu.memory for gpu in gpus))


def on_cluster() -> bool:
    """Whether this is a pod that Flyte started, rather than a local run."""
    return "FLYTE_INTERNAL_EXECUTION_ID" in os.environ


def check_gpus_seen(asked: int) -> None:
    """ForgeError where this process sees fewer GPUs than its pod has asked for: it never goes on with less, or a CPU.

    `asked` is the setting `gpus`, and 0 where no pod asked.
    """
    import torch

    seen = torch.cuda.device_count() if asked else 0
    if seen < asked:
        raise ForgeError(
            f"GPUs: this pod asked for {asked}, and torch sees {seen} on {platform.node()}; look at the driver "
            "(nvidia-smi on the node), at the device plugin's pod there, and at the runtime class nvidia"
        )


def training_gpus() -> list[GPU]:
    """The GPUs of a node that trains: of the cluster's, where a pod asks, else of this machine; empty for a CPU."""
    return gpus_of(TRAINING) if on_cluster() else find_gpus()


def find_gpus() -> list[GPU]:
    """This machine's GPUs that CUDA_VISIBLE_DEVICES lets torch use; empty without a driver or with torch for CPUs."""
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
            # CUDA leaves out all from the first one that is not there.
            with contextlib.suppress(pynvml.NVMLError, IndexError):
                index = name.strip()
                chosen.append(handles[int(index)] if index.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(index))
                continue
            break
        handles = chosen
    found = []
    for handle in handles:
        name = pynvml.nvmlDeviceGetName(handle)
        known = next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name), None)
        found.append(GPU(name, pynvml.nvmlDeviceGetMemoryInfo(handle).total, known.flops if known else None))
    return found
