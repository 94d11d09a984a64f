"""All parallelism: how a model is recomputed, compiled, replicated or sharded over the ranks."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from forge.capacity.training_memory import Parallelism
from forge.core.recipe import TrainingRecipe
from tasks.finetune.loss import TrainedTokenLoss
from tasks.finetune.process_group import Rank


def parallelize(loss: TrainedTokenLoss, recipe: TrainingRecipe, rank: Rank, how: Parallelism) -> nn.Module:
    """The loss of this rank's share of a batch; its gradients are the mean over the ranks.

    In this order: activation checkpointing, then compilation of each layer, then sharding.
    """
    layers = layers_of(loss.causal)
    if recipe.activation_checkpointing != "none":
        every = 2 if recipe.activation_checkpointing == "selective" else 1
        loss.causal.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    if recipe.compile:
        for layer in layers:
            layer.compile(dynamic=False)
    if how == "ddp":
        return DistributedDataParallel(loss, device_ids=[rank.device.index] if rank.device.type == "cuda" else None)
    if how == "none":
        return loss
    if how == "hybrid":
        shape = (recipe.nodes, rank.world // recipe.nodes)
        mesh = init_device_mesh(rank.device.type, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(rank.device.type, (rank.world,))
    policy = MixedPrecisionPolicy()
    if recipe.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss, mesh=mesh, mp_policy=policy)
    return loss


def layers_of(causal: Any) -> nn.ModuleList:
    """The transformer's blocks."""
    count = causal.config.get_text_config().num_hidden_layers
    return next(m for m in causal.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def sync_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass shares gradients out among the ranks: the last one of an accumulation does.

    Sharded gradients are always shared out: a rank has no room for whole ones.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = wanted
