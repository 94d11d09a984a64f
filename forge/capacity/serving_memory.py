"""Whether what a rollout wants to serve fits, told from config.json and the size of the weights, before all else.

It is what vLLM 0.32 does with a GPU's memory: of the share that it takes, what weights, adapters and the activations of
the largest step leave is the KV cache. Sources are named by their file in vLLM. Imports no torch.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forge.capacity.training_memory import FP32, SHORTEST_CONTEXT
from forge.cluster.gpus import GIB, GPU, find_gpus, gpus_of
from forge.cluster.nodes import SERVING
from forge.core.contracts import Engine
from forge.core.errors import ForgeError, Problems
from forge.core.settings import Settings

UTILIZATION = 0.92  # of a GPU's memory, vLLM's default (config/cache.py); CUDA and NCCL have what they need of the rest
VISIBLE = 0.985  # of what nvidia-smi says, what CUDA does: 39.4 to 39.6 GiB of an A100's 40, 79.2 of 80
BLOCK = 16  # tokens in a block of the KV cache
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes (config/lora.py)
# Bytes for each logit of the sampler: 1.26 GiB were measured with 256 x 128256 of them (github.com/vllm-project/vllm
# pull 10511), and 4.8 with 1024 x 128256 (github.com/llm-d-incubation/llm-d-planner issue 194), activations included.
LOGIT = 40
GRAPHS = GIB  # CUDA's graphs, which vLLM measures when it starts (v1/worker/gpu_model_runner.py)
AWQ = (4 + (16 + 4) / 128) / 8  # bytes a weight: 4 bits, and a scale and a zero for 128 of them (arXiv:2306.00978)
AWQ_BUILDS = {"Llama-3.1-70B": "hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4"}  # by a part of the base's name
LARGEST_NODE = 16  # GPUs; more are not proposed


@dataclass(frozen=True)
class DecoderShape:
    """What of a decoder decides the memory that it is served in. Attention is grouped, and MLPs are gated."""

    layers: int
    windowed: int  # of the layers, those that attend to `window` tokens alone
    window: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int  # of one expert, where there are several
    experts: int
    active: int  # experts that a token takes
    vocabulary: int
    embeddings: int  # weights, those of the output layer included where they are others
    element: int  # bytes of a value
    longest: int | None  # tokens that it was made for

    def divides(self, gpus: int) -> bool:
        """Whether tensor parallelism can divide it; where there are fewer KV heads than GPUs, they are replicated."""
        more, fewer = max(self.kv_heads, gpus), min(self.kv_heads, gpus)
        return self.heads % gpus == 0 and more % fewer == 0 and self.intermediate % gpus == 0

    def slot(self, rank: int, gpus: int) -> int:
        """Bytes of an adapter's slot on one GPU: A (rank x inputs) and B (outputs x rank) beside every layer's weights.

        Of queries, keys, values, gate and up, B is divided over GPUs, and of the other two A (lora/layers/, where
        fully_sharded_loras is off); embeddings and logits are whole, and few models have no slot for them.
        """
        query, key = self.heads // gpus * self.head, max(1, self.kv_heads // gpus) * self.head
        attention = 3 * self.hidden + query + 2 * key + query + self.hidden
        router = self.hidden + self.experts if self.experts > 1 else 0
        mlp = router + self.experts * 3 * (self.hidden + self.intermediate // gpus)
        ends = 2 * (self.vocabulary + self.hidden)
        return rank * self.element * (self.layers * (attention + mlp) + ends)


@dataclass(frozen=True)
class Fit:
    """What is served, and how it uses each GPU's memory, in bytes.

    `concurrency` sequences of `context` tokens are wanted at once, and one of `served`, without which vLLM won't start.
    """

    shape: DecoderShape
    weight_bytes: int
    slots: int
    rank: int
    gpu: GPU | None  # None: a CPU, whose memory is not checked
    gpus: int
    served: int
    context: int
    concurrency: int

    @property
    def memory(self) -> float:
        """Of a GPU, as CUDA says it."""
        return self.gpu.memory * VISIBLE if self.gpu else 0

    @property
    def batch(self) -> tuple[int, int]:
        """Tokens and sequences in a step: the API's defaults (engine/arg_utils.py, get_batch_defaults)."""
        if self.memory >= 160 * GIB:
            return 16_384, 1024
        large = self.gpu and self.memory >= 70 * GIB and "a100" not in self.gpu.name.lower()
        return (8192, 1024) if large else (2048, 256)

    @property
    def usable(self) -> int:
        """What vLLM takes."""
        return int(self.memory * UTILIZATION)

    @property
    def weights(self) -> int:
        """Weights; the norms, which are whole on each GPU, are a ten-thousandth of them."""
        return -(-self.weight_bytes // self.gpus)

    @property
    def adapters(self) -> int:
        """The slots of adapters, used or not."""
        return self.slots * self.shape.slot(self.rank, self.gpus)

    @property
    def reserve(self) -> int:
        """CUDA's graphs, a layer's gpus_for moment (the stream, gate, up, their product) and what is drawn from."""
        tokens, sequences = self.batch
        wide = 4 * self.shape.hidden + 3 * self.shape.active * self.shape.intermediate // self.gpus
        return GRAPHS + tokens * wide * self.shape.element + sequences * self.shape.vocabulary * LOGIT

    @property
    def room(self) -> int:
        """What is left for the KV cache."""
        return self.usable - self.weights - self.adapters - self.reserve

    @property
    def token(self) -> int:
        """Keys and values of a token in one layer (config/model.py, get_num_kv_heads)."""
        return 2 * max(1, self.shape.kv_heads // self.gpus) * self.shape.head * self.shape.element

    def sequence(self, tokens: int) -> int:
        """Keys and values of a sequence; a window keeps a step's tokens more (v1/kv_cache_interface.py)."""
        shape, window = self.shape, min(tokens, self.shape.window + self.batch[0])
        blocks = (shape.layers - shape.windowed) * -(-tokens // BLOCK) + shape.windowed * -(-window // BLOCK)
        return blocks * BLOCK * self.token

    @property
    def cache(self) -> int:
        """The KV cache that is wanted."""
        return max(self.sequence(self.served), self.concurrency * self.sequence(self.context))

    @property
    def sequences(self) -> int:
        """How many sequences of the context fit at once."""
        return max(0, self.room // self.sequence(self.context))

    def shorten(self, tokens: int) -> "Fit":
        """The same where no sequence is longer."""
        return replace(self, served=min(tokens, self.served), context=min(tokens, self.context))

    def __str__(self) -> str:
        if not self.gpu:
            return "no GPU, so its memory is not checked"
        return (
            f"of each of {self.gpus} x {self.gpu.name} vLLM takes {self.usable / GIB:.1f} GiB: {self._parts()}, "
            f"KV cache {self.room / GIB:.1f} ({self._cost()}: {_several(self.sequences, self.context)} at once)"
        )

    def explain(self) -> str:
        """The arithmetic, where it does not fit."""
        count = 1 if self.cache == self.sequence(self.served) else self.concurrency
        wanted = _several(count, self.served if count == 1 else self.context)
        needed = self.usable - self.room + self.cache
        return (
            f"each of {self.gpus} x {self.gpu and self.gpu.name} needs {needed / GIB:.1f} GiB ({self._parts()}, "
            f"KV cache {self.cache / GIB:.1f} for {wanted}, {self._cost()}), and vLLM takes {self.usable / GIB:.1f} of "
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
        return f"{self.shape.layers * self.token / 2**10:g} KiB a token"


def serving_gpus(settings: Settings) -> list[GPU]:
    """The GPUs that serve: of the cluster's inference node, or of this machine; empty for a CPU."""
    return gpus_of(SERVING) if settings.serving_target == "kubernetes" else find_gpus()


def check_adapters(engine: Engine, adapters: int, rank: int | None, name: str) -> None:
    """Whether so many adapters fit the slots of a base that serves; ForgeError, or Problems, where they do not."""
    problems = list(_adapter_problems(engine, adapters, rank))
    if problems:
        raise Problems(f"{name} cannot serve it:", problems) if problems[1:] else ForgeError(f"{name}: {problems[0]}")


def gpus_for(config: dict[str, Any], gpus: Sequence[GPU], name: str) -> int:
    """On how many of the GPUs a base is served: as many as can divide it."""
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
    """How a base with this config.json and these bytes of safetensors fits the GPUs (none: a CPU).

    `concurrency` sequences of `context` tokens (None: as many as the engine takes) must fit at once; `adapters` are
    those loaded at once, old ones beside new ones, and `adapter_rank` the largest rank of theirs.

    Raises ForgeError with the arithmetic and what would fit, or Problems where there are several.
    """
    shape, count = read_shape(config, name), engine.tensor_parallel
    served = engine.max_model_len or shape.longest or context or SHORTEST_CONTEXT
    wanted = context or served
    problems = list(_adapter_problems(engine, adapters, adapter_rank))
    if shape.longest and max(served, wanted) > shape.longest:
        problems.append(
            f"serving.max_model_len {max(served, wanted)}: its config.json ends at {shape.longest}; take no more"
        )
    elif wanted > served:
        problems.append(
            f"serving.max_model_len {wanted}: it serves {served} tokens; take no more, or roll the base out anew"
        )
    options = [n for n in range(1, LARGEST_NODE + 1) if shape.divides(n)]
    if count not in options:
        problems.append(
            f"tensor parallelism over {count} GPUs: its {shape.heads} attention heads, {shape.kv_heads} heads of keys "
            f"and values and MLPs of {shape.intermediate} are divided by {', '.join(map(str, options))}; take as many"
        )
    elif gpus and count > len(gpus):
        problems.append(f"tensor parallelism over {count} GPUs: there are {len(gpus)}; take no more")
    gpu = min(gpus[:count], key=lambda one: one.memory) if gpus else None
    slots, rank = engine.max_loras, engine.max_lora_rank
    fit = Fit(shape, weight_bytes, slots, rank, gpu, count, served, wanted, concurrency)
    if gpu and not problems and fit.cache > fit.room:
        ways = [text for text, _ in _ways(fit, adapters, adapter_rank)]
        if "quantization_config" not in config:
            ways += _quantised(fit, adapters, adapter_rank, name)
        fix = f"it fits with {', or with '.join(ways)}" if ways else "nothing helps, so take a smaller base model"
        problems.append(f"{fit.explain()}; {fix}")
    if len(problems) > 1:
        raise Problems(f"{name} cannot be served:", problems)
    if problems:
        raise ForgeError(f"{name} cannot be served: {problems[0]}")
    return fit


def read_shape(config: dict[str, Any], name: str) -> DecoderShape:
    """The shape that a config.json describes; ForgeError where it lacks what is needed."""
    text = {**config, **(config.get("text_config") or {})}

    def value(*names: str, default: Any = None) -> Any:
        found = next((text[one] for one in names if text.get(one) is not None), default)
        if found is None:
            raise ForgeError(f"{name}: its config.json has no {names[0]}; take a base model whose config.json says it")
        return found

    hidden, heads = value("hidden_size", "n_embd"), value("num_attention_heads", "n_head")
    vocabulary, window = value("vocab_size"), value("sliding_window", default=0)
    experts = value("num_local_experts", "num_experts", "n_routed_experts", default=1) or 1
    intermediate = value("intermediate_size", "n_inner", default=4 * hidden)
    # Factors of other kinds are in max_position_embeddings already (config/model.py, _get_and_verify_max_len).
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) not in ("linear", "dynamic") or "gemma3" in text.get("model_type", ""):
        rope = {}
    longest = value("max_position_embeddings", "n_positions", default=0)
    return DecoderShape(
        layers=value("num_hidden_layers", "n_layer"),
        windowed=value("layer_types", default=[]).count("sliding_attention") if window else 0,
        window=window,
        hidden=hidden,
        heads=heads,
        kv_heads=value("num_key_value_heads", default=heads),
        head=value("head_dim", default=hidden // heads),
        intermediate=value("moe_intermediate_size", default=intermediate) if experts > 1 else intermediate,
        experts=experts,
        active=value("num_experts_per_tok", default=1) if experts > 1 else 1,
        vocabulary=vocabulary,
        embeddings=vocabulary * hidden * (1 if value("tie_word_embeddings", default=False) else 2),
        element=FP32 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2,
        longest=int(longest * (rope.get("factor") or 1)) or None,
    )


def _adapter_problems(engine: Engine, adapters: int, rank: int | None) -> Iterator[str]:
    takes = "vLLM is started anew for"
    if engine.max_loras < adapters:
        yield (
            f"serving.max_loras {engine.max_loras}: {adapters} adapters are loaded at once, those that "
            f"are replaced included; take {adapters}, which {takes}"
        )
    if engine.max_loras and engine.max_lora_rank not in RANKS:
        yield f"serving.max_lora_rank {engine.max_lora_rank}: vLLM takes {', '.join(map(str, RANKS))}; take one of them"
    if rank is not None and rank > engine.max_lora_rank:
        enough = next((one for one in RANKS if one >= rank), None)
        fix = f"take serving.max_lora_rank {enough}, which {takes}" if enough else f"train with at most {RANKS[-1]}"
        yield f"adapter of rank {rank}: the base is served with serving.max_lora_rank {engine.max_lora_rank}; {fix}"


def _ways(fit: Fit, adapters: int, rank: int | None) -> Iterator[tuple[str, Fit]]:
    """Changes, one at a time, with which it fits, and what it is then; those that cost the least come first."""
    slots = min(fit.slots, adapters)
    enough = next((one for one in RANKS if one >= (rank or fit.rank)), fit.rank)
    lengths = range(BLOCK, fit.served + 1, BLOCK)
    length = BLOCK * bisect.bisect_right(lengths, fit.room, key=lambda tokens: fit.shorten(tokens).cache)
    spread = [n for n in range(fit.gpus + 1, LARGEST_NODE + 1) if fit.shape.divides(n)]
    changes = [
        (f"serving.max_loras {slots}", replace(fit, slots=slots)),
        (f"serving.max_lora_rank {enough}", replace(fit, rank=min(enough, fit.rank))),
        (f"serving.concurrency {fit.sequences}", replace(fit, concurrency=max(1, fit.sequences))),
        (f"serving.max_model_len {length}", fit.shorten(max(length, SHORTEST_CONTEXT))),
        *((f"tensor parallelism over {n} x {fit.gpu and fit.gpu.name}", replace(fit, gpus=n)) for n in spread),
    ]
    for text, changed in changes:
        if changed.cache <= changed.room:
            yield text, changed
            if changed.gpus > fit.gpus:
                return


def _quantised(fit: Fit, adapters: int, rank: int | None, name: str) -> Iterator[str]:
    """The same with weights of 4 bits, but for its embeddings, and a change more where it needs one."""
    linear = fit.weight_bytes // fit.shape.element - fit.shape.embeddings
    small, more = replace(fit, weight_bytes=int(AWQ * linear) + 2 * fit.shape.embeddings), ""
    if small.cache > small.room:
        more, small = next(_ways(small, adapters, rank), ("", small))
    if linear > 0 and small.cache <= small.room:
        known = next((f" ({build})" for part, build in AWQ_BUILDS.items() if part in name), "")
        yield (
            f"4-bit AWQ weights{known}{' and ' * bool(more)}{more}: {small.weight_bytes / GIB:.1f} GiB, "
            f"{small.weights / GIB:.1f} a GPU, with room for {_several(small.sequences, small.context)}"
        )


def _several(count: int, tokens: int) -> str:
    return f"{count} sequence{'s' * (count != 1)} of {tokens} tokens"
