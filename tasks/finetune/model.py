"""The model: built from an architecture or loaded from a base model, with an adapter if the recipe wants one."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from forge.core.errors import ForgeError
from forge.core.recipe import Lora, ModelRecipe
from forge.models.weights import load_causal
from forge.registry.packages import LocalBase
from tasks.finetune.checkpoint import reason

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTER = "default"  # peft's name for the only one


def build_model(
    recipe: ModelRecipe, base: LocalBase, tokenizer: Any, context: int, seed: int, dtype: torch.dtype
) -> Any:
    """A causal language model: new weights for an architecture (the same for a seed), else the base's."""
    torch.manual_seed(seed)
    if recipe.architecture is not None:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.architecture.hidden_size,
            intermediate_size=recipe.architecture.intermediate_size,
            num_hidden_layers=recipe.architecture.layers,
            num_attention_heads=recipe.architecture.heads,
            num_key_value_heads=recipe.architecture.heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    return load_causal(base, dtype)


def build_quantised(base: LocalBase, dtype: torch.dtype, device: torch.device) -> Any:
    """The base model with its linear layers in 4 bits (NF4, the constants quantised too), but for the output layer.

    As in QLoRA (https://arxiv.org/abs/2305.14314); products are in `dtype`. Four bits lie in elements of that type too,
    since FSDP casts what it gathers.
    """
    from bitsandbytes.nn import Linear4bit  # takes a second, and few need it

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    causal = load_causal(base, dtype, quantization_config=quantisation, device_map={"": device})
    for module in causal.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it repacks weights for inference, and then trains no more
    return causal


def load_config(base: LocalBase) -> Any:
    """The base model's configuration."""
    try:
        return AutoConfig.from_pretrained(base.location, revision=base.revision or None, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ForgeError(f"base model {base.location}: cannot be loaded: {str(error).splitlines()[0]}") from None


def build_empty(base: LocalBase, dtype: torch.dtype) -> Any:
    """The base model without its weights (on the meta device); buffers, which no file holds, are there."""
    config = load_config(base)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def load_sharded(causal: Any, base: LocalBase, device: torch.device) -> None:
    """Give an empty model that is sharded its weights: each rank reads its own part of the files."""
    directory = local_directory(base)
    named = [*causal.named_parameters(), *causal.named_buffers()]
    real = {name: tensor.detach().to(device, copy=True) for name, tensor in named if not tensor.is_meta}
    causal.to_empty(device=device)  # which empties buffers and adapters too
    with torch.no_grad():
        for name, tensor in [*causal.named_parameters(), *causal.named_buffers()]:
            if name in real:
                tensor.copy_(real[name])
    causal.tie_weights()
    names = weight_names(directory)
    state = {name.replace(".base_layer.", "."): weight for name, weight in causal.state_dict().items()}
    wanted = {name.replace(".base_layer.", ".") for name, _ in named if name not in real}
    if missing := sorted(wanted - names - set(causal.all_tied_weights_keys or ())):
        raise ForgeError(
            f"base model {base.location}: its files name weights in another way than the model does ({missing[0]} is "
            "missing); set training.parallelism to ddp"
        )
    state = {name: weight for name, weight in state.items() if name in wanted & names}
    try:
        checkpoint.load(state, storage_reader=HuggingFaceStorageReader(str(directory)))
    except checkpoint.CheckpointException as error:
        raise ForgeError(f"base model {base.location}: cannot be loaded ({reason(error)}); copy it anew") from None


def local_directory(base: LocalBase) -> Path:
    """Where the base model's files are on this machine; downloads them from the hub if they are not."""
    if Path(base.location).is_dir():
        return Path(base.location)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base.location, revision=base.revision, allow_patterns=["*.json", "*.safetensors"]))


def weight_names(directory: Path) -> set[str]:
    """Names of the weights in a directory's safetensors."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text())["weight_map"])
    from safetensors import safe_open

    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def add_adapter(causal: Any, lora: Lora, seed: int) -> Any:
    """Freeze a model and give it a low-rank adapter to train (fp32), which starts as no change at all.

    The model is changed in place; returns peft's view of it, for saving.
    """
    from peft import LoraConfig, get_peft_model  # takes two seconds to import, which only adapters need
    from peft.tuners.lora import LoraLayer

    targets = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in a way that is going
            adapted = get_peft_model(causal, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(f"training.lora.target_modules {targets}: {reason}") from None
    torch.manual_seed(seed)
    for module in causal.modules():
        if isinstance(module, LoraLayer):
            for part in (module.lora_A, module.lora_B):
                if part[ADAPTER].weight.is_meta:  # as the model is that gets its weights later
                    part.to_empty(device="cpu")
            module.reset_lora_parameters(ADAPTER, init_lora_weights=True)
    return adapted
