"""What of a decoder decides its memory, found in its config.json. Imports no torch until asked."""

import re
from dataclasses import dataclass
from typing import Any

from forge.core.errors import ForgeError
from forge.core.recipe import Architecture, Lora

BYTE_VOCABULARY = 262  # of models from scratch: the bytes and six special tokens


@dataclass(frozen=True)
class ModelSize:
    """What of a decoder decides its memory: counts of parameters, and widths (per token)."""

    parameters: int  # a tied one counts once
    layers: int
    layer: int  # parameters of the largest layer
    head: int  # weights of the output layer, tied or not
    linears: tuple[tuple[str, int, int], ...]  # name and shape of each linear layer's weights but the output one's
    vocabulary: int
    hidden: int
    query: int  # heads x head size
    heads: int
    intermediate: int
    norms: int  # over the hidden size, in a layer
    query_norms: int  # widths of the norms of queries and keys, summed
    softcap: bool  # whether the logits are capped

    @property
    def outside(self) -> int:
        """Parameters outside the layers: embeddings, the output layer and the last norm."""
        return self.parameters - self.layers * self.layer

    @property
    def linear(self) -> int:
        """Weights of the linear layers: those that autocast copies and NF4 quantises."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def adapter(self, lora: Lora) -> int:
        """Parameters of an adapter (two matrices beside each linear layer that is named, as peft makes them).

        Raises ForgeError where the model has none of lora.target_modules.
        """
        names = lora.target_modules
        chosen = [
            (inputs, outputs)
            for name, inputs, outputs in self.linears
            if names == ["all-linear"] or any(name == one or name.endswith(f".{one}") for one in names)
        ]
        if not chosen:
            known = sorted({name.rsplit(".", 1)[-1] for name, _, _ in self.linears})
            raise ForgeError(
                f"training.lora.target_modules {names}: the base model has none of these; its linear layers are "
                f"{', '.join(known)} (or take all-linear)"
            )
        return sum(lora.rank * (inputs + outputs) for inputs, outputs in chosen)


def architecture_config(architecture: Architecture, context: int) -> dict[str, Any]:
    """The config.json of a model that is trained from scratch."""
    return {
        "model_type": "llama",
        "vocab_size": BYTE_VOCABULARY,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }


def measure_model(config: dict[str, Any]) -> ModelSize:
    """The size of the model that a config.json describes.

    Llama's is reckoned; others are built without memory, on torch's meta device, which takes seconds the first time, as
    torch and transformers are imported. Raises ForgeError where they know no causal language model of that kind.
    """
    if llama := _llama(config):
        return llama
    try:
        return _measure(config)
    except Exception as error:  # a wrong value of a configuration is any error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ForgeError(
            f"base model: transformers can build no causal language model from its config.json ({reason}); "
            "take a base model of a kind that it knows"
        ) from None


def _measure(config: dict[str, Any]) -> ModelSize:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    values = dict(config)
    known = AutoConfig.for_model(values.pop("model_type", ""), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known)
    text = model.config.get_text_config()
    count, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count)
    head = model.get_output_embeddings()
    size = getattr(text, "head_dim", None) or hidden // heads
    norms = [one.numel() for name, one in layers[0].named_parameters() if re.search(r"norm\w*\.weight$", name)]
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=count,
        layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        head=head.weight.numel(),
        linears=tuple(
            (name, *part.weight.shape)
            for name, part in model.named_modules()
            if isinstance(part, torch.nn.Linear | Conv1D) and part is not head
        ),
        vocabulary=head.weight.shape[0],
        hidden=hidden,
        query=heads * size,
        heads=heads,
        intermediate=getattr(text, "intermediate_size", None) or 4 * hidden,
        norms=norms.count(hidden) or 2,
        query_norms=(heads + (getattr(text, "num_key_value_heads", None) or heads)) * size if size in norms else 0,
        softcap=bool(getattr(text, "final_logit_softcapping", None)),
    )


def _llama(config: dict[str, Any]) -> ModelSize | None:
    """What `_measure` finds of a Llama; None of another model, and where something is missing or odd."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    values = [config.get(name) for name in names]
    tied = config.get("tie_word_embeddings")
    if config.get("model_type") != "llama" or not isinstance(tied, bool):
        return None
    if any(not isinstance(value, int) or value < 1 for value in values) or values[0] % values[3]:  # type: ignore[operator]
        return None
    if config.get("attention_bias") or config.get("mlp_bias"):
        return None
    hidden, wide, layers, heads, vocabulary = (int(value) for value in values)  # type: ignore[arg-type]
    keys = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    query, key = heads * head, keys * head
    shapes = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    layer = sum(inputs * outputs for inputs, outputs in shapes.values()) + 2 * hidden
    return ModelSize(
        parameters=layers * layer + hidden + (1 if tied else 2) * vocabulary * hidden,
        layers=layers,
        layer=layer,
        head=vocabulary * hidden,
        linears=tuple((f"model.layers.{at}.{name}", *shape) for at in range(layers) for name, shape in shapes.items()),
        vocabulary=vocabulary,
        hidden=hidden,
        query=query,
        heads=heads,
        intermediate=wide,
        norms=2,
        query_norms=0,
        softcap=False,
    )
