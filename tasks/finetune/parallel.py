"""Parallelism: activation checkpointing, compilation, and replicating or sharding a model over the ranks."""

import math
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from forge.capacity.training_memory import Parallelism
from forge.core.errors import ForgeError
from forge.core.recipe import TrainingRecipe
from tasks.finetune.loss import TrainedTokenLoss
from tasks.finetune.process_group import Rank


def parallelize(loss: TrainedTokenLoss, recipe: TrainingRecipe, rank: Rank, parallelism: Parallelism) -> nn.Module:
    """The loss of this rank's share of a batch; gradients are averaged over the ranks.

    Applies, in this order, activation checkpointing, compilation of each layer, and DDP or FSDP.
    """
    layers = layers_of(loss.model)
    if recipe.activation_checkpointing != "none":
        every = 2 if recipe.activation_checkpointing == "selective" else 1
        loss.model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    if recipe.compile:
        for layer in layers:
            layer.compile(dynamic=False)
    if parallelism == "ddp":
        return DistributedDataParallel(loss, device_ids=[rank.device.index] if rank.device.type == "cuda" else None)
    if parallelism == "none":
        return loss
    if parallelism == "hybrid":
        shape = (recipe.nodes, rank.world_size // recipe.nodes)
        mesh = init_device_mesh(rank.device.type, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    policy = MixedPrecisionPolicy()
    if recipe.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss, mesh=mesh, mp_policy=policy)
    return loss


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder's layers."""
    count = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def sync_gradients(module: nn.Module, last: bool) -> None:
    """Set whether the next backward pass averages gradients over the ranks: only the last one of a global batch does.

    With FSDP each pass does, since a rank has no memory for unsharded gradients.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = last


def adapt_to_world_size(recipe: TrainingRecipe, world_size: int) -> TrainingRecipe:
    """The recipe for this many processes; ForgeError if they cannot share the global batch evenly."""
    share, rest = divmod(recipe.global_batch_size, world_size)
    if rest or world_size % recipe.nodes:
        raise ForgeError(
            f"{recipe.global_batch_size} rows cannot be divided among {world_size} processes on {recipe.nodes} node(s)",
            where="training.global_batch_size",
            fix="change one of them",
        )
    micro = recipe.micro_batch_size
    changes: dict[str, Any] = {"nproc_per_node": world_size // recipe.nodes}
    return recipe.model_copy(update={**changes, "micro_batch_size": micro and math.gcd(micro, share)})


def all_reduce_sum(value: torch.Tensor, rank: Rank) -> torch.Tensor:
    """A tensor summed over the ranks."""
    value = value.detach().clone()
    if rank.world_size > 1:
        distributed.all_reduce(value)
    return value
