"""The model: built from an architecture or loaded from a base model, with an adapter if the recipe has one."""

import json
import re
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from forge.capacity.model_size import architecture_config
from forge.core.errors import ForgeError
from forge.core.recipe import Lora, ModelRecipe
from forge.models.hub import INDEX, check_unquantised, local_directory
from forge.models.weights import load_causal
from forge.registry.packages import LocalBase
from tasks.finetune.checkpoint import checkpoint_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
READING = timedelta(hours=2)  # of a base by the first rank
ADAPTER = "default"  # peft's name for a single adapter


def build_model(
    recipe: ModelRecipe, base: LocalBase, tokenizer: Any, context: int, seed: int, dtype: torch.dtype
) -> Any:
    """A causal language model: an architecture with random weights (reproducible by seed), or the base model."""
    torch.manual_seed(seed)
    if recipe.architecture is not None:
        config = AutoConfig.for_model(
            **architecture_config(recipe.architecture, context),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    return load_causal(base, dtype)


def freeze_unused(model: Any) -> None:
    """Freeze what texts do not use, such as the part of a model that reads images: it gets no gradients."""
    used = {id(weight) for part in (model.get_decoder(), model.get_output_embeddings()) for weight in part.parameters()}
    for weight in model.parameters():
        if id(weight) not in used:
            weight.requires_grad_(False)


def build_quantised(base: LocalBase, dtype: torch.dtype, device: torch.device) -> Any:
    """The base model with 4-bit linear layers (NF4 with double quantisation), except the output layer.

    As in QLoRA (https://arxiv.org/abs/2305.14314); products are in `dtype`. The 4-bit values are stored in elements of
    `dtype` too, since FSDP casts the parameters that it gathers.
    """
    from bitsandbytes.nn import Linear4bit  # takes a second to import, and few runs need it

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    model = load_causal(base, dtype, quantization_config=quantisation, device_map={"": device})
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it would repack weights for inference, which breaks training
    return model


def load_config(base: LocalBase) -> Any:
    """The base model's configuration; raises ForgeError if it cannot be loaded, or its weights are quantised."""
    where = f"base model {base.location}"
    try:
        config = AutoConfig.from_pretrained(base.location, revision=base.revision or None, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(f"cannot be loaded: {reason}", where=where) from None
    check_unquantised(config.to_dict(), where)
    return config


def build_empty(base: LocalBase, dtype: torch.dtype) -> Any:
    """The base model without weights (on the meta device) but with its buffers, which no file holds."""
    config = load_config(base)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def load_sharded(model: Any, base: LocalBase, device: torch.device) -> None:
    """Load the weights of a sharded model built by `build_empty`: each rank reads its own part of the files."""
    directory = local_directory(base)
    named = [*model.named_parameters(), *model.named_buffers()]
    real = {name: tensor.detach().to(device, copy=True) for name, tensor in named if not tensor.is_meta}
    model.to_empty(device=device)  # this loses buffers and adapters, so they are copied back
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in real:
                tensor.copy_(real[name])
    model.tie_weights()
    names = weight_names(directory)
    state = {_name_in_base(name): weight for name, weight in model.state_dict().items()}
    expected = {_name_in_base(name) for name, _ in named if name not in real}
    if expected - names - set(model.all_tied_weights_keys or ()):
        return load_from_first_rank(model, base)
    state = {name: weight for name, weight in state.items() if name in expected & names}
    try:
        checkpoint.load(state, storage_reader=HuggingFaceStorageReader(str(directory)))
    except checkpoint.CheckpointException as error:
        raise ForgeError(
            f"cannot be loaded ({checkpoint_error(error)})", where=f"base model {base.location}", fix="copy it again"
        ) from None


def _name_in_base(name: str) -> str:
    """The name in the base model of a weight that adapters are wrapped around."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def load_from_first_rank(model: Any, base: LocalBase) -> None:
    """Load the weights of a sharded model whose files name or group them differently, as those of experts do.

    The first rank reads all of them into its memory, renames them as transformers does, and sends each rank its part.
    """
    dtype = next(model.parameters()).dtype
    whole = load_causal(base, dtype).state_dict() if distributed.get_rank() == 0 else {}
    # Reading may take longer than a collective of training may.
    distributed.barrier(distributed.new_group(backend="gloo", timeout=READING))
    adapted = {_name_in_base(name): name for name in model.state_dict()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, {adapted[name]: weight for name, weight in whole.items()}, options=options)


def weight_names(directory: Path) -> set[str]:
    """Names of the weights in a directory's safetensors."""
    index = directory / INDEX
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    from safetensors import safe_open

    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def outside_decoder(model: Any) -> str | None:
    """A regular expression for the linear layers that texts do not use, such as those that read images, if any."""
    modules = dict(model.named_modules())
    decoder = next(name for name, module in modules.items() if module is model.get_decoder())
    head = model.get_output_embeddings()
    unused = (
        isinstance(module, torch.nn.Linear) and module is not head and not name.startswith(f"{decoder}.")
        for name, module in modules.items()
    )
    return rf"(?!{re.escape(decoder)}\.).*" if decoder and any(unused) else None


def add_adapter(model: Any, lora: Lora, seed: int) -> Any:
    """Freeze a model and add a low-rank adapter (fp32) that does not change its outputs yet.

    Changes the model in place; returns peft's wrapper, for saving.
    """
    from peft import LoraConfig, get_peft_model  # takes two seconds to import
    from peft.tuners.lora import LoraLayer

    targets = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        exclude_modules=outside_decoder(model),
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated transformers API
            adapted = get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(reason, where=f"training.lora.target_modules {targets}") from None
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for part in (module.lora_A, module.lora_B):
                if part[ADAPTER].weight.is_meta:  # load_sharded loads the weights later
                    part.to_empty(device="cpu")
            module.reset_lora_parameters(ADAPTER, init_lora_weights=True)
    return adapted
