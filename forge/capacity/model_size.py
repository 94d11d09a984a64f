"""The size of a model, from its config.json. Imports no torch for a Llama."""

import re
from dataclasses import dataclass
from typing import Any

from forge.capacity.decoder_shape import read_shape
from forge.core.errors import ForgeError
from forge.core.recipe import Architecture, Lora

BYTE_VOCABULARY = 262  # vocabulary of models trained from scratch: 256 bytes and six special tokens


@dataclass(frozen=True)
class ModelSize:
    """What decides a decoder's memory in training: parameter counts, and widths (values per token)."""

    parameters: int  # tied ones count once
    layers: int
    layer: int  # parameters of the largest decoder layer
    head: int  # weights of the output layer, tied or not
    linears: tuple[tuple[str, int, int], ...]  # name and weight shape of each linear layer but the output layer
    vocabulary: int
    hidden: int
    query: int  # heads x dimensions per head
    heads: int
    intermediate: int
    norms: int  # per layer, over the hidden size
    query_norms: int  # sum of the widths of query and key norms
    softcap: bool  # whether the logits are capped

    @property
    def outside(self) -> int:
        """Parameters outside the decoder layers: embeddings, output layer and final norm."""
        return self.parameters - self.layers * self.layer

    @property
    def linear(self) -> int:
        """Weights of the linear layers, which autocast casts and NF4 quantizes."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def adapter(self, lora: Lora) -> int:
        """Parameters of an adapter: two matrices per target module, as peft creates them.

        Raises ForgeError if the model lacks one of lora.target_modules. The output layer is none of them.
        """
        names = lora.target_modules
        found = {
            one: [size for name, *size in self.linears if name == one or name.endswith(f".{one}")] for one in names
        }
        if names == ["all-linear"]:
            found = {"all-linear": [size for _, *size in self.linears]}
        if missing := [one for one, sizes in found.items() if not sizes]:
            known = sorted({name.rsplit(".", 1)[-1] for name, _, _ in self.linears})
            raise ForgeError(
                "the base model has no such linear layers that can be adapted",
                where=f"training.lora.target_modules {missing}",
                fix=f"its linear layers are {', '.join(known)} (or take all-linear)",
            )
        return sum(lora.rank * sum(size) for sizes in found.values() for size in sizes)


def architecture_config(architecture: Architecture, context: int) -> dict[str, Any]:
    """The config.json of a Llama to train from scratch, with multi-head attention and tied embeddings."""
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

    Computed for a Llama. Other models are built on torch's meta device, without memory; that takes seconds the first
    time, to import torch and transformers. Raises ForgeError if transformers has no causal language model of this type.
    """
    if llama := _llama(config):
        return llama
    try:
        return _measure(config)
    except Exception as error:  # a wrong configuration can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ForgeError(
            f"transformers can't build a causal language model from its config.json ({reason})",
            where="base model",
            fix="take a base model of a type that transformers supports",
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
    decoder = model.get_decoder()  # without what reads images, which texts do not train
    parts = dict.fromkeys(decoder.modules())
    layers = next(part for part in parts if isinstance(part, torch.nn.ModuleList) and len(part) == count)
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
            if isinstance(part, torch.nn.Linear | Conv1D) and part is not head and part in parts
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
    """The same as `_measure` for a Llama; None for other models, and for incomplete or unusual configurations."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    tied = config.get("tie_word_embeddings")
    if config.get("model_type") != "llama" or not isinstance(tied, bool):
        return None
    if any(not isinstance(config.get(name), int) or config[name] < 1 for name in names):
        return None
    if config["hidden_size"] % config["num_attention_heads"] or config.get("attention_bias") or config.get("mlp_bias"):
        return None
    shape = read_shape(config, "base model")
    hidden, wide = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head, shape.kv_heads * shape.head
    linears = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    layer = sum(inputs * outputs for inputs, outputs in linears.values()) + 2 * hidden
    return ModelSize(
        parameters=shape.layers * layer + hidden + shape.embeddings,
        layers=shape.layers,
        layer=layer,
        head=shape.vocabulary * hidden,
        linears=tuple(
            (f"model.layers.{at}.{name}", *size) for at in range(shape.layers) for name, size in linears.items()
        ),
        vocabulary=shape.vocabulary,
        hidden=hidden,
        query=query,
        heads=shape.heads,
        intermediate=wide,
        norms=2,
        query_norms=0,
        softcap=False,
    )
