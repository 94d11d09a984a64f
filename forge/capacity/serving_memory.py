"""Whether vLLM can serve a model, estimated from config.json and the size of the weights. Imports no torch.

The estimate follows vLLM 0.32: it takes a share of a GPU's memory, and what the weights, the adapter slots and the
activations of the largest step leave of that is the KV cache. Files of vLLM's source are named where a rule comes from
them.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forge.capacity.decoder_shape import DecoderShape, read_shape
from forge.capacity.training_memory import SHORTEST_CONTEXT
from forge.cluster.gpus import GIB, GPU, find_gpus, gpus_of
from forge.cluster.nodes import SERVING
from forge.core.contracts import Engine
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import MAX_LORA_RANKS
from forge.core.settings import Settings

UTILIZATION = 0.92  # of a GPU's memory: vLLM's default (config/cache.py); the rest is for CUDA and NCCL
VISIBLE = 0.985  # of the memory that nvidia-smi reports: what CUDA can use, such as 39.4 to 39.6 of an A100's 40 GiB
BLOCK = 16  # tokens per block of the KV cache
# Bytes per logit in the sampler. Measured: 1.26 GiB for 256 x 128256 logits (vllm-project/vllm pull 10511), and 4.8 GiB
# for 1024 x 128256, activations included (llm-d-incubation/llm-d-planner issue 194), both on GitHub.
LOGIT = 40
GRAPHS = GIB  # CUDA graphs, which vLLM profiles at startup (v1/worker/gpu_model_runner.py)
AWQ = (4 + (16 + 4) / 128) / 8  # bytes per weight: 4 bits, and a scale and a zero point per 128 (arXiv:2306.00978)
AWQ_BUILDS = {"Llama-3.1-70B": "hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4"}  # by part of the base's name
LARGEST_NODE = 16  # GPUs; larger tensor parallelism is not suggested


@dataclass(frozen=True)
class Fit:
    """A model to serve, and how it uses each GPU's memory, in bytes.

    The KV cache must hold `concurrency` sequences of `context` tokens, and one of `served` tokens (max_model_len),
    which vLLM needs to start.
    """

    shape: DecoderShape
    weight_bytes: int
    slots: int
    rank: int
    gpu: GPU | None  # None: a CPU; its memory is not checked
    gpus: int
    served: int
    context: int
    concurrency: int

    @property
    def memory(self) -> float:
        """A GPU's memory as CUDA reports it."""
        return self.gpu.memory * VISIBLE if self.gpu else 0

    @property
    def batch(self) -> tuple[int, int]:
        """Most tokens and sequences per step: the server's defaults (engine/arg_utils.py, get_batch_defaults)."""
        if self.memory >= 160 * GIB:
            return 16_384, 1024
        large = self.gpu and self.memory >= 70 * GIB and "a100" not in self.gpu.name.lower()
        return (8192, 1024) if large else (2048, 256)

    @property
    def usable(self) -> int:
        """The share that vLLM takes."""
        return int(self.memory * UTILIZATION)

    @property
    def weights(self) -> int:
        """Sharded weights. Norms are replicated, but only a ten-thousandth of the weights."""
        return -(-self.weight_bytes // self.gpus)

    @property
    def adapters(self) -> int:
        """Adapter slots, used or not."""
        return self.slots * self.shape.slot(self.rank, self.gpus)

    @property
    def reserve(self) -> int:
        """CUDA graphs, activations of a layer (residual stream, gate, up, their product), and logits of the sampler."""
        tokens, sequences = self.batch
        wide = 4 * self.shape.hidden + 3 * self.shape.active * self.shape.intermediate // self.gpus
        return GRAPHS + tokens * wide * self.shape.element + sequences * self.shape.vocabulary * LOGIT

    @property
    def free(self) -> int:
        """What is left for the KV cache; negative if the rest does not fit."""
        return self.usable - self.weights - self.adapters - self.reserve

    @property
    def token(self) -> int:
        """Keys and values of one token in one layer (config/model.py, get_num_kv_heads)."""
        return 2 * max(1, self.shape.kv_heads // self.gpus) * self.shape.head * self.shape.element

    def sequence(self, tokens: int) -> int:
        """Keys and values of a sequence. A sliding window keeps one step's tokens more (v1/kv_cache_interface.py)."""
        shape, window = self.shape, min(tokens, self.shape.window + self.batch[0])
        blocks = (shape.layers - shape.windowed) * -(-tokens // BLOCK) + shape.windowed * -(-window // BLOCK)
        return blocks * BLOCK * self.token

    @property
    def cache(self) -> int:
        """The KV cache that is needed."""
        return max(self.sequence(self.served), self.concurrency * self.sequence(self.context))

    @property
    def sequences(self) -> int:
        """How many sequences of `context` tokens fit together."""
        return max(0, self.free // self.sequence(self.context))

    def shorten(self, tokens: int) -> "Fit":
        """The same with sequences of at most this many tokens."""
        return replace(self, served=min(tokens, self.served), context=min(tokens, self.context))

    def __str__(self) -> str:
        if not self.gpu:
            return "no GPU, so memory is not checked"
        return (
            f"vLLM takes {self.usable / GIB:.1f} GiB of each of {self.gpus} x {self.gpu.name}: {self._parts()}, "
            f"KV cache {self.free / GIB:.1f} ({self._cost()}: {_several(self.sequences, self.context)} together)"
        )

    def explain(self) -> str:
        """The calculation, if it does not fit."""
        count = 1 if self.cache == self.sequence(self.served) else self.concurrency
        load = _several(count, self.served if count == 1 else self.context)
        needed = self.usable - self.free + self.cache
        return (
            f"each of {self.gpus} x {self.gpu and self.gpu.name} needs {needed / GIB:.1f} GiB ({self._parts()}, "
            f"KV cache {self.cache / GIB:.1f} for {load}, {self._cost()}), and vLLM takes {self.usable / GIB:.1f} of "
            f"its {self.memory / GIB:.1f}"
        )

    def _parts(self) -> str:
        whole = f" of {self.weight_bytes / GIB:.1f}" if self.gpus > 1 else ""
        slots = f"{self.adapters / GIB:.1f} in {self.slots} slots of rank {self.rank}"
        return (
            f"weights {self.weights / GIB:.1f}{whole}, adapters {slots if self.slots else 'none'}, "
            f"activations and CUDA graphs {self.reserve / GIB:.1f}"
        )

    def _cost(self) -> str:
        return f"{self.shape.layers * self.token / 2**10:g} KiB per token"


def serving_gpus(settings: Settings) -> list[GPU]:
    """The GPUs that serve: the cluster's inference node's, or this machine's; empty for a CPU."""
    return gpus_of(SERVING) if settings.serving_target == "kubernetes" else find_gpus()


def check_adapters(engine: Engine, adapters: int, rank: int | None, name: str) -> None:
    """Raise ForgeError, or Problems, if a running server has too few slots for this many adapters, or the rank is too
    high. `name` is the base's.
    """
    _raise(list(_adapter_problems(engine, adapters, rank)), f"{name} cannot serve this adapter")


def gpus_for(config: dict[str, Any], gpus: Sequence[GPU], name: str) -> int:
    """The number of GPUs to serve a base on: as many as tensor parallelism can use."""
    shape = read_shape(config, name)
    return max((count for count in range(1, len(gpus) + 1) if shape.divides(count)), default=1)


def check_serving(
    config: dict[str, Any],
    weight_bytes: int,
    engine: Engine,
    gpus: Sequence[GPU],
    name: str,
    *,
    context: int | None = None,
    concurrency: int = 1,
    adapters: int = 0,
    adapter_rank: int | None = None,
) -> Fit:
    """Check that a base with this config.json and this many bytes of safetensors fits the GPUs (none: a CPU).

    `concurrency` sequences of `context` tokens (None: the engine's max_model_len) must fit together. `adapters` is the
    largest number of adapters loaded together, counting an old and a new version; `adapter_rank` is their largest rank.

    Raises ForgeError with the calculation and what would fit, or Problems if there are several.
    """
    shape, count = read_shape(config, name), engine.tensor_parallel
    served = engine.max_model_len or shape.longest or context or SHORTEST_CONTEXT
    needed = context or served
    problems = list(_adapter_problems(engine, adapters, adapter_rank))
    if shape.longest and max(served, needed) > shape.longest:
        problems.append(
            f"serving.max_model_len {max(served, needed)}: the model's context is {shape.longest} tokens; take no more"
        )
    elif needed > served:
        problems.append(
            f"serving.max_model_len {needed}: the server was started with {served}; take no more, or roll out the base "
            "again"
        )
    options = [n for n in range(1, LARGEST_NODE + 1) if shape.divides(n)]
    if count not in options:
        problems.append(
            f"tensor parallelism over {count} GPUs: {shape.heads} attention heads, {shape.kv_heads} KV heads and MLPs "
            f"of {shape.intermediate} can't be divided by it; take {', '.join(map(str, options))}"
        )
    elif gpus and count > len(gpus):
        problems.append(f"tensor parallelism over {count} GPUs: there are {len(gpus)}; take no more")
    gpu = min(gpus[:count], key=lambda one: one.memory) if gpus else None
    slots, rank = engine.max_loras, engine.max_lora_rank
    fit = Fit(shape, weight_bytes, slots, rank, gpu, count, served, needed, concurrency)
    if gpu and not problems and fit.cache > fit.free:
        changes = [text for text, _ in _changes(fit, adapters, adapter_rank)]
        if "quantization_config" not in config:
            changes += _quantized(fit, adapters, adapter_rank, name)
        fix = f"it fits with {', or with '.join(changes)}" if changes else "no change helps; take a smaller base model"
        problems.append(f"{fit.explain()}; {fix}")
    _raise(problems, f"{name} cannot be served")
    return fit


def _raise(problems: list[str], title: str) -> None:
    """Raise one problem as ForgeError, and several as Problems."""
    if len(problems) > 1:
        raise Problems(f"{title}:", problems)
    if problems:
        raise ForgeError(problems[0], where=title)


def _adapter_problems(engine: Engine, adapters: int, rank: int | None) -> Iterator[str]:
    restarts = "which restarts vLLM"
    if engine.max_loras < adapters:
        yield (
            f"serving.max_loras {engine.max_loras}: {adapters} adapters are loaded together during the rollout, "
            f"counting those it replaces; take {adapters}, {restarts}"
        )
    if engine.max_loras and engine.max_lora_rank not in MAX_LORA_RANKS:
        ranks = ", ".join(map(str, MAX_LORA_RANKS))
        yield f"serving.max_lora_rank {engine.max_lora_rank}: vLLM takes {ranks}; take one of them"
    if rank is not None and rank > engine.max_lora_rank:
        enough = next((one for one in MAX_LORA_RANKS if one >= rank), None)
        fix = (
            f"take serving.max_lora_rank {enough}, {restarts}" if enough else f"train with at most {MAX_LORA_RANKS[-1]}"
        )
        yield f"adapter of rank {rank}: the base is served with serving.max_lora_rank {engine.max_lora_rank}; {fix}"


def _changes(fit: Fit, adapters: int, rank: int | None) -> Iterator[tuple[str, Fit]]:
    """Single changes with which it fits, and the changed Fit, cheapest first."""
    slots = min(fit.slots, adapters)
    enough = next((one for one in MAX_LORA_RANKS if one >= (rank or fit.rank)), fit.rank)
    lengths = range(BLOCK, fit.served + 1, BLOCK)
    length = BLOCK * bisect.bisect_right(lengths, fit.free, key=lambda tokens: fit.shorten(tokens).cache)
    more_gpus = [n for n in range(fit.gpus + 1, LARGEST_NODE + 1) if fit.shape.divides(n)]
    changes = [
        (f"serving.max_loras {slots}", replace(fit, slots=slots)),
        (f"serving.max_lora_rank {enough}", replace(fit, rank=min(enough, fit.rank))),
        (f"serving.concurrency {fit.sequences}", replace(fit, concurrency=max(1, fit.sequences))),
        (f"serving.max_model_len {length}", fit.shorten(max(length, SHORTEST_CONTEXT))),
        *((f"tensor parallelism over {n} x {fit.gpu and fit.gpu.name}", replace(fit, gpus=n)) for n in more_gpus),
    ]
    for text, changed in changes:
        if changed.cache <= changed.free:
            yield text, changed
            if changed.gpus > fit.gpus:
                return


def _quantized(fit: Fit, adapters: int, rank: int | None, name: str) -> Iterator[str]:
    """The same with 4-bit weights (except the embeddings), and one more change if it needs one."""
    linear = fit.weight_bytes // fit.shape.element - fit.shape.embeddings
    small, change = replace(fit, weight_bytes=int(AWQ * linear) + 2 * fit.shape.embeddings), ""
    if small.cache > small.free:
        change, small = next(_changes(small, adapters, rank), ("", small))
    if linear > 0 and small.cache <= small.free:
        build = next((f" ({build})" for part, build in AWQ_BUILDS.items() if part in name), "")
        yield (
            f"4-bit AWQ weights{build}{' and ' * bool(change)}{change}: {small.weight_bytes / GIB:.1f} GiB, "
            f"{small.weights / GIB:.1f} per GPU, with a KV cache for {_several(small.sequences, small.context)}"
        )


def _several(count: int, tokens: int) -> str:
    return f"{count} sequence{'s' * (count != 1)} of {tokens} tokens"
