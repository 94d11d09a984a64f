"""The memory that one training process needs, part by part, and what fits. Imports no torch until asked.

The parts are those of mixed-precision AdamW (ZeRO, section 3, https://arxiv.org/abs/1910.02054) and the activations of
a decoder block with a gated MLP whose attention keeps no scores. They were derived as Korthikanti et al. do
(https://arxiv.org/abs/2205.05198, section 4) from what autograd saves of the blocks in transformers. A compiled layer
saves less, so that compilation makes these figures an upper bound.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil

from forge.capacity.model_size import ModelSize
from forge.cluster.gpus import GIB, GPU
from forge.core.errors import ForgeError
from forge.core.recipe import Lora, TrainingRecipe

Parallelism = Literal["none", "ddp", "fsdp", "hybrid"]

FP32 = 4  # bytes
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes a weight, its doubly quantised constants included: QLoRA, section 3
LOSS_CHUNK = 1024  # tokens whose logits are held at once
SHORTEST_CONTEXT = 512  # tokens; no shorter one is proposed


@dataclass(frozen=True)
class Memory:
    """Bytes that one training process needs at the peak of a step, by what they are for."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments
    buckets: int  # DDP's copy of the gradients, in which they are averaged
    copies: int  # weights in the precision of the products: autocast's, or what FSDP has gathered of all processes
    activations: int  # what the forward pass leaves for the backward pass
    workspace: int  # the larger of what the loss, and what one layer's backward pass, need for a moment

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in asdict(self).items() if size)
        return f"{self.total / GIB:.1f} GiB ({parts})"


def estimate_memory(model: ModelSize, training: TrainingRecipe, context: int, parallelism: Parallelism) -> Memory:
    """What one process needs for rows of `context` tokens; bytes."""
    sharded = parallelism in ("fsdp", "hybrid")
    shards = {"fsdp": training.nodes * training.nproc_per_node, "hybrid": training.nproc_per_node}.get(parallelism, 1)
    element = 2 if training.precision == "bf16" else FP32
    adapter = model.adapter(training.lora) if training.lora else 0
    trained = adapter if training.lora else model.parameters

    base = FP32 * model.parameters
    layer = element * model.layer
    if training.lora:
        base = element * model.parameters
    dequantised = 0
    if training.method == "qlora":
        base = math.ceil(NF4 * model.linear) + element * (model.parameters - model.linear)
        layer = math.ceil(NF4 * model.linear / model.layers)
        dequantised = element * max(inputs * outputs for _, inputs, outputs in model.linears)
    if sharded:  # all that is outside the layers, the layer at work and the next one
        copies = element * model.outside + 2 * layer
    else:
        copies = 2 * (adapter if training.lora else model.linear) if training.precision == "bf16" else 0

    tokens = context * (
        training.micro_batch_size or training.global_batch_size // (training.nodes * training.nproc_per_node)
    )
    saved = _layer_activations(model, training, context, tokens, sharded)
    stream = tokens * model.hidden * _stream(training, sharded)
    recomputed = {"none": 0, "selective": math.ceil(model.layers / 2), "full": model.layers}[
        training.activation_checkpointing
    ]
    ends = 2 * stream + FP32 * tokens * model.hidden  # the embedded tokens, and the last norm's input and output
    backward = (saved if recomputed else 0) + 2 * element * tokens * model.intermediate
    if sharded:  # a layer's gradients are whole before they are summed over the processes, in fp32
        backward += (adapter // model.layers if training.lora else model.layer) * (element + FP32)
    return Memory(
        weights=math.ceil((base + FP32 * adapter) / shards),
        gradients=math.ceil(FP32 * trained / shards),
        optimizer=math.ceil(2 * FP32 * trained / shards),
        buckets=FP32 * trained if parallelism == "ddp" else 0,
        copies=copies + dequantised,
        activations=(model.layers - recomputed) * saved + recomputed * stream + ends,
        workspace=max(_loss(model, training, tokens, sharded), backward),
    )


def _stream(training: TrainingRecipe, sharded: bool) -> int:
    """Bytes of an element of the residual stream: autocast leaves it in the precision of the embeddings."""
    return 2 if training.precision == "bf16" and (training.lora or sharded) else FP32


def _layer_activations(model: ModelSize, training: TrainingRecipe, context: int, tokens: int, sharded: bool) -> int:
    """Bytes that autograd saves of one decoder layer, by its operations.

    Norms keep their input in fp32 and, where they are trained, what they have normalised. Linear layers that are
    trained keep their input: one copy for all that read it, or a cast each (autocast, adapters, dropout). Attention
    keeps queries, keys and values (repeated to as many heads), its output, and in fp32 one sum a head. The gated MLP
    keeps the gate before and after its activation, the other branch and their product. An attention mask that keeps
    the documents of a packed row apart is context x context.
    """
    lora, element = training.lora, 2 if training.precision == "bf16" else FP32
    cast = element == 2 and not sharded  # FSDP casts weights and inputs beforehand
    trained_norms = 0 if lora else 1
    wide = model.norms * (FP32 + trained_norms * _stream(training, sharded))
    wide += element * (5 if cast or (lora and lora.dropout) else 2)
    token = model.hidden * wide + 4 * element * (model.query + model.intermediate) + FP32 * model.heads
    token += model.query_norms * (FP32 + trained_norms * element)
    if lora and (cast or lora.dropout):
        token += element * model.query
    if lora and lora.dropout:  # one byte for each input that may be dropped
        token += 5 * model.hidden + model.query + model.intermediate
    return tokens * (token + element * context)


def _loss(model: ModelSize, training: TrainingRecipe, tokens: int, sharded: bool) -> int:
    """Bytes that the chunked loss needs at once: a chunk's logits, and the gradients of its input and its weights."""
    element = 2 if training.precision == "bf16" else FP32
    logits = min(LOSS_CHUNK, tokens) * model.vocabulary * (FP32 + element + (2 * FP32 if model.softcap else 0))
    weights = 0
    if training.method == "full":
        weights = model.head * (FP32 + element)
        weights += model.head * element if element == 2 and not sharded else 0
    return logits + weights + 2 * tokens * model.hidden * _stream(training, sharded)


def resolve_parallelism(
    model: ModelSize, training: TrainingRecipe, context: int, gpu: GPU | None = None
) -> Parallelism:
    """What training.parallelism comes to on such GPUs (None: a CPU).

    One process needs none. auto is ddp where that fits, else hybrid on several nodes where that does, else fsdp; on a
    CPU it is ddp.
    """
    if training.nodes * training.nproc_per_node == 1:
        return "none"
    if training.parallelism != "auto":
        return training.parallelism
    options: list[Parallelism] = ["ddp", "hybrid"] if training.nodes > 1 else ["ddp"]
    for option in options:
        if gpu is None or estimate_memory(model, training, context, option).total <= gpu.usable:
            return option
    return "fsdp"


def check_fit(model: ModelSize, training: TrainingRecipe, context: int, gpu: GPU | None = None) -> Memory:
    """The estimate for one process, where it fits the GPU; without one, all processes share this machine.

    Raises ForgeError with the estimate by part and the nearest change of the recipe that would fit.
    """
    here = training.nodes * training.nproc_per_node
    room = gpu.usable if gpu else psutil.virtual_memory().total // here
    memory = estimate_memory(model, training, context, resolve_parallelism(model, training, context, gpu))
    if memory.total <= room:
        return memory
    if gpu:
        place = f"{gpu.name} has {gpu.usable / GIB:.1f} GiB for it (of {gpu.memory / GIB:.1f})"
    else:
        sharers = f" for each of {here} processes" if here > 1 else ""
        place = f"this machine has {room / GIB:.1f} GiB{sharers}"
    mend = nearest_fit(model, training, context, gpu, room)
    raise ForgeError(
        f"training does not fit: one process needs {memory}, and {place}; "
        + (f"it fits with {', '.join(mend)}" if mend else "no change of the recipe helps, so take a smaller base model")
    )


def nearest_fit(model: ModelSize, training: TrainingRecipe, context: int, gpu: GPU | None, room: int) -> list[str]:
    """The changes of a recipe, as it would say them, with which a process needs no more than `room` bytes.

    Changes that leave the result as it is come first, as few as will do; then a shorter context, then another method.
    """
    for changes in _combinations(training, context, gpu):
        update = {name: value for name, value in changes.items() if name != "max_seq_len"}
        if changes.get("method", "full") != "full" and training.lora is None:
            update["lora"] = Lora()
        changed = training.model_copy(update=update)
        length = changes.get("max_seq_len", context)
        how = resolve_parallelism(model, changed, length, gpu)
        if estimate_memory(model, changed, length, how).total <= room:
            said = [
                f"{'data' if name == 'max_seq_len' else 'training'}.{name} {value}" for name, value in changes.items()
            ]
            return said + ["training.lora {rank: 16}"] * ("lora" in update)
    return []


def _combinations(training: TrainingRecipe, context: int, gpu: GPU | None) -> Iterator[dict[str, Any]]:
    """Changes of a recipe that need less memory, nearest first."""
    world = training.nodes * training.nproc_per_node
    share = training.global_batch_size // world
    rows = training.micro_batch_size or share
    levels, methods = ["none", "selective", "full"], ["full", "lora", "qlora"] if gpu else ["full", "lora"]
    groups: dict[str, list[Any]] = {
        "micro_batch_size": [fewer for fewer in range(rows - 1, 0, -1) if share % fewer == 0],
        "activation_checkpointing": levels[levels.index(training.activation_checkpointing) + 1 :],
        "parallelism": ["fsdp"] if world > 1 and training.parallelism in ("ddp", "hybrid") else [],
        "max_seq_len": [context >> n for n in range(1, 32) if context >> n >= SHORTEST_CONTEXT],
        "method": methods[methods.index(training.method) + 1 :] if training.method in methods else [],
    }

    def distance(chosen: tuple[int, ...]) -> tuple[Any, ...]:
        *neutral, shorter, method = chosen
        return method, shorter, sum(map(bool, neutral)), [not one for one in neutral], neutral

    for chosen in sorted(itertools.product(*(range(len(options) + 1) for options in groups.values())), key=distance):
        yield {name: groups[name][at - 1] for name, at in zip(groups, chosen, strict=True) if at}
