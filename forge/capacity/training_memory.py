"""An estimate of the memory that one training process needs, part by part. Imports no torch until it is needed.

The parts are those of mixed-precision AdamW (ZeRO, section 3, https://arxiv.org/abs/1910.02054) and the activations of
a decoder block with a gated MLP and memory-efficient attention. The activations are derived as by Korthikanti et al.
(https://arxiv.org/abs/2205.05198, section 4), from what autograd saves in the blocks of transformers. torch.compile
saves fewer, so the estimate is an upper bound for it.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil

from forge.capacity.decoder_shape import FP32
from forge.capacity.model_size import ModelSize
from forge.cluster.gpus import GIB, GPU
from forge.core.errors import ForgeError
from forge.core.recipe import Lora, TrainingRecipe

Parallelism = Literal["none", "ddp", "fsdp", "hybrid"]

NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes per weight with double quantization: QLoRA, section 3
LOSS_CHUNK = {"cpu": 256, "cuda": 1024}  # tokens whose logits the loss computes together, by device
SHORTEST_CONTEXT = 512  # tokens; shorter contexts are not suggested


@dataclass(frozen=True)
class Memory:
    """Bytes that one training process needs at the peak of a step, by purpose."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments
    buckets: int  # DDP's copy of the gradients, for all-reduce
    copies: int  # weights cast by autocast or dequantized, or gathered by FSDP
    activations: int  # saved by the forward pass for the backward pass
    workspace: int  # temporary memory of the loss or of one layer's backward pass, whichever is larger

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in asdict(self).items() if size)
        return f"{self.total / GIB:.1f} GiB ({parts})"


def estimate_memory(model: ModelSize, training: TrainingRecipe, context: int, parallelism: Parallelism) -> Memory:
    """The memory of one process for rows of `context` tokens."""
    sharded = parallelism in ("fsdp", "hybrid")
    shards = {"fsdp": training.world_size, "hybrid": training.nproc_per_node}.get(parallelism, 1)
    element = 2 if training.precision == "bf16" else FP32
    adapter = model.adapter(training.lora) if training.lora else 0
    trained = adapter if training.lora else model.parameters

    base = FP32 * model.parameters
    layer = element * model.layer
    if training.lora:
        base = element * model.parameters
    dequantized = 0
    if training.method == "qlora":
        base = math.ceil(NF4 * model.linear) + element * (model.parameters - model.linear)
        layer = math.ceil(NF4 * model.linear / model.layers)
        dequantized = element * max(inputs * outputs for _, inputs, outputs in model.linears)
    if sharded:  # the parameters outside the layers, the current layer and the prefetched one
        copies = element * model.outside + 2 * layer
    else:
        copies = 2 * (adapter if training.lora else model.linear) if training.precision == "bf16" else 0

    tokens = context * (training.micro_batch_size or training.global_batch_size // training.world_size)
    saved = _layer_activations(model, training, context, tokens, sharded)
    stream = tokens * model.hidden * _stream(training, sharded)
    recomputed = {"none": 0, "selective": math.ceil(model.layers / 2), "full": model.layers}[
        training.activation_checkpointing
    ]
    ends = 2 * stream + FP32 * tokens * model.hidden  # embeddings, and the final norm's input and output
    backward = (saved if recomputed else 0) + 2 * element * tokens * model.intermediate
    if sharded:  # a layer's full gradients, before they are reduced in fp32
        backward += (adapter // model.layers if training.lora else model.layer) * (element + FP32)
    return Memory(
        weights=math.ceil((base + FP32 * adapter) / shards),
        gradients=math.ceil(FP32 * trained / shards),
        optimizer=math.ceil(2 * FP32 * trained / shards),
        buckets=FP32 * trained if parallelism == "ddp" else 0,
        copies=copies + dequantized,
        activations=(model.layers - recomputed) * saved + recomputed * stream + ends,
        workspace=max(_loss(model, training, tokens, sharded), backward),
    )


def _stream(training: TrainingRecipe, sharded: bool) -> int:
    """Bytes per element of the residual stream, which keeps the precision of the embeddings under autocast."""
    return 2 if training.precision == "bf16" and (training.lora or sharded) else FP32


def _layer_activations(model: ModelSize, training: TrainingRecipe, context: int, tokens: int, sharded: bool) -> int:
    """Bytes that autograd saves in one decoder layer, by operation.

    - Norms: the input in fp32 and, if they are trained, the normalized input.
    - Trained linear layers: the input, either one shared copy or one cast copy each (autocast, adapters, dropout).
    - Attention: queries, keys and values (keys and values repeated for all heads), the output, and the log-sum-exp of
      each head in fp32.
    - Gated MLP: the gate before and after its activation, the up projection, and their product.
    - The mask that separates the documents of a packed row: context x context.
    """
    lora, element = training.lora, 2 if training.precision == "bf16" else FP32
    cast = element == 2 and not sharded  # FSDP casts weights and inputs before the layer
    trained_norms = 0 if lora else 1
    wide = model.norms * (FP32 + trained_norms * _stream(training, sharded))
    wide += element * (5 if cast or (lora and lora.dropout) else 2)
    token = model.hidden * wide + 4 * element * (model.query + model.intermediate) + FP32 * model.heads
    token += model.query_norms * (FP32 + trained_norms * element)
    if lora and (cast or lora.dropout):
        token += element * model.query
    if lora and lora.dropout:  # a byte-sized dropout mask per input
        token += 5 * model.hidden + model.query + model.intermediate
    return tokens * (token + element * context)


def _loss(model: ModelSize, training: TrainingRecipe, tokens: int, sharded: bool) -> int:
    """Bytes that the chunked loss needs: a chunk's logits, and the gradients of its input and its weights."""
    element = 2 if training.precision == "bf16" else FP32
    logits = min(LOSS_CHUNK["cuda"], tokens) * model.vocabulary * (FP32 + element + (2 * FP32 if model.softcap else 0))
    weights = 0
    if training.method == "full":
        weights = model.head * (FP32 + element)
        weights += model.head * element if element == 2 and not sharded else 0
    return logits + weights + 2 * tokens * model.hidden * _stream(training, sharded)


def resolve_parallelism(
    model: ModelSize, training: TrainingRecipe, context: int, gpu: GPU | None = None
) -> Parallelism:
    """The parallelism to use on GPUs of this type (None: a CPU).

    A single process needs none. auto is ddp if that fits, else hybrid on several nodes if that fits, else fsdp; on a
    CPU it is ddp.
    """
    if training.world_size == 1:
        return "none"
    if training.parallelism != "auto":
        return training.parallelism
    options: list[Parallelism] = ["ddp", "hybrid"] if training.nodes > 1 else ["ddp"]
    for option in options:
        if gpu is None or estimate_memory(model, training, context, option).total <= gpu.usable:
            return option
    return "fsdp"


def check_fit(model: ModelSize, training: TrainingRecipe, context: int, gpu: GPU | None = None) -> Memory:
    """The estimate for one process, if it fits the GPU. Without a GPU, all processes share this machine's memory.

    Otherwise raises ForgeError with the estimate by part, and the smallest change to the recipe that would fit.
    """
    processes = training.world_size
    available = gpu.usable if gpu else psutil.virtual_memory().total // processes
    memory = estimate_memory(model, training, context, resolve_parallelism(model, training, context, gpu))
    if memory.total <= available:
        return memory
    if gpu:
        limit = f"{gpu.name} has {gpu.usable / GIB:.1f} GiB for it (of {gpu.memory / GIB:.1f})"
    else:
        each = f" for each of {processes} processes" if processes > 1 else ""
        limit = f"this machine has {available / GIB:.1f} GiB{each}"
    changes = nearest_fit(model, training, context, gpu, available)
    raise ForgeError(
        f"training does not fit: one process needs {memory}, and {limit}",
        fix=f"it fits with {', '.join(changes)}"
        if changes
        else "no change to the recipe helps, so take a smaller base model",
    )


def nearest_fit(model: ModelSize, training: TrainingRecipe, context: int, gpu: GPU | None, available: int) -> list[str]:
    """The smallest changes to a recipe, as written in it, with which a process needs at most `available` bytes.

    Changes that don't affect the result come first, as few as possible; then a shorter context, then another method.
    """
    for changes in _combinations(training, context, gpu):
        update = {name: value for name, value in changes.items() if name != "max_seq_len"}
        if changes.get("method", "full") != "full" and training.lora is None:
            update["lora"] = Lora()
        changed = training.model_copy(update=update)
        length = changes.get("max_seq_len", context)
        parallelism = resolve_parallelism(model, changed, length, gpu)
        if estimate_memory(model, changed, length, parallelism).total <= available:
            fields = [
                f"{'data' if name == 'max_seq_len' else 'training'}.{name} {value}" for name, value in changes.items()
            ]
            return fields + ["training.lora {rank: 16}"] * ("lora" in update)
    return []


def _combinations(training: TrainingRecipe, context: int, gpu: GPU | None) -> Iterator[dict[str, Any]]:
    """Changes to a recipe that need less memory, smallest first."""
    share = training.global_batch_size // training.world_size
    rows = training.micro_batch_size or share
    levels, methods = ["none", "selective", "full"], ["full", "lora", "qlora"] if gpu else ["full", "lora"]
    groups: dict[str, list[Any]] = {
        "micro_batch_size": [fewer for fewer in range(rows - 1, 0, -1) if share % fewer == 0],
        "activation_checkpointing": levels[levels.index(training.activation_checkpointing) + 1 :],
        "parallelism": ["fsdp"] if training.world_size > 1 and training.parallelism in ("ddp", "hybrid") else [],
        "max_seq_len": [context >> n for n in range(1, 32) if context >> n >= SHORTEST_CONTEXT],
        "method": methods[methods.index(training.method) + 1 :] if training.method in methods else [],
    }

    def distance(chosen: tuple[int, ...]) -> tuple[Any, ...]:
        *neutral, shorter, method = chosen
        return method, shorter, sum(map(bool, neutral)), [not one for one in neutral], neutral

    for chosen in sorted(itertools.product(*(range(len(options) + 1) for options in groups.values())), key=distance):
        yield {name: groups[name][at - 1] for name, at in zip(groups, chosen, strict=True) if at}
