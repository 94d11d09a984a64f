"""The dimensions of a decoder, read from its config.json. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from forge.core.errors import ForgeError

FP32 = 4  # bytes


@dataclass(frozen=True)
class DecoderShape:
    """The dimensions of a decoder with grouped-query attention and gated MLPs, which decide its memory."""

    layers: int
    windowed: int  # layers with sliding-window attention
    window: int  # tokens
    hidden: int
    heads: int
    kv_heads: int
    head: int  # dimensions per head
    intermediate: int  # per expert, if there are several
    experts: int
    active: int  # experts per token
    vocabulary: int
    embeddings: int  # weights, including the output layer's if they are not tied
    element: int  # bytes per value
    longest: int | None  # context length (tokens)

    def divides(self, gpus: int) -> bool:
        """Whether tensor parallelism over this many GPUs is possible. KV heads are replicated if there are fewer."""
        more, fewer = max(self.kv_heads, gpus), min(self.kv_heads, gpus)
        return self.heads % gpus == 0 and more % fewer == 0 and self.intermediate % gpus == 0

    def slot(self, rank: int, gpus: int) -> int:
        """Bytes per GPU of an adapter slot: A (rank x inputs) and B (outputs x rank) for the weights of every layer.

        B is sharded over the GPUs for queries, keys, values, gate and up projections, and A for the output and down
        projections (vllm/lora/layers/, without fully_sharded_loras). Embeddings and logits are not sharded; few models
        have no slot for them.
        """
        query, key = self.heads // gpus * self.head, max(1, self.kv_heads // gpus) * self.head
        attention = 3 * self.hidden + query + 2 * key + query + self.hidden
        router = self.hidden + self.experts if self.experts > 1 else 0
        mlp = router + self.experts * 3 * (self.hidden + self.intermediate // gpus)
        ends = 2 * (self.vocabulary + self.hidden)
        return rank * self.element * (self.layers * (attention + mlp) + ends)


def read_shape(config: dict[str, Any], name: str) -> DecoderShape:
    """The shape that a config.json describes; `name` is the model's. Raises ForgeError if a dimension is missing."""
    text = {**config, **(config.get("text_config") or {})}

    def value(*names: str, default: Any = None) -> Any:
        found = next((text[one] for one in names if text.get(one) is not None), default)
        if found is None:
            raise ForgeError(
                f"its config.json has no {names[0]}", where=name, fix="take a base model whose config.json has it"
            )
        return found

    hidden, heads = value("hidden_size", "n_embd"), value("num_attention_heads", "n_head")
    vocabulary, window = value("vocab_size"), value("sliding_window", default=0)
    experts = value("num_local_experts", "num_experts", "n_routed_experts", default=1) or 1
    intermediate = value("intermediate_size", "n_inner", default=4 * hidden)
    # For other RoPE types, max_position_embeddings includes the factor (vllm/config/model.py, _get_and_verify_max_len).
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
