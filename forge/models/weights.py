"""Complete models: loaded, saved in Hugging Face format, and merged from a base and an adapter.

Training's export and evaluation merge adapters with the same function, and so get the same bytes.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from forge.core.errors import ForgeError
from forge.models.chat import load_tokenizer
from forge.models.hub import GENERATION_CONFIG
from forge.registry.packages import LocalBase

SHOWN = 3  # names of weights in a message
SHARD = "5GB"  # maximum size of a safetensors file


def load_causal(base: LocalBase, dtype: torch.dtype, **options: Any) -> Any:
    """A causal language model with its weights.

    Raises ForgeError if it cannot be loaded, or if its files lack a weight (transformers would draw random numbers for
    it) or have others.
    """
    where = f"base model {base.location}"
    try:
        causal, found = AutoModelForCausalLM.from_pretrained(
            base.location,
            revision=base.revision or None,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ForgeError(f"cannot be loaded: {reason}", where=where) from None
    for keys, what in (("missing_keys", "lack"), ("unexpected_keys", "have weights that the model does not have:")):
        if names := sorted(found[keys]):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ForgeError(
                f"its files {what} {', '.join(names[:SHOWN])}{more}",
                where=where,
                fix="copy it again; its weights must be those of its config.json",
            )
    return causal


def save(
    causal: Any,
    weights: dict[str, Any],
    dtype: torch.dtype,
    tokenizer: Any,
    directory: Path,
    ends: Collection[int] = (),
) -> None:
    """Write weights, configuration and tokenizer in Hugging Face format.

    `ends` are tokens that the model has learned to end a turn with. The generation config gets them, so that servers
    stop there. It is otherwise that of `causal`, even if transformers would not save it.
    """
    generation = causal.generation_config
    causal.generation_config = type(generation)()
    tied = set(causal.all_tied_weights_keys or ())
    kept = {name: weight.to(dtype).contiguous() for name, weight in weights.items() if name not in tied}
    causal.save_pretrained(directory, state_dict=kept, max_shard_size=SHARD)
    causal.generation_config = generation
    write_generation_config(generation, ends, directory)
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"  # has the dtype of training
    config = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def write_generation_config(generation: Any, ends: Collection[int], directory: Path) -> None:
    """Write a generation config, its end tokens extended by `ends`."""
    known = generation.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    tokens = list(dict.fromkeys([*known, *sorted(ends)]))
    values = generation.to_diff_dict() | ({"eos_token_id": tokens[0] if len(tokens) == 1 else tokens} if tokens else {})
    text = json.dumps(values, indent=2, sort_keys=True)
    (directory / GENERATION_CONFIG).write_text(text + "\n", encoding="utf-8")


def merge(base: LocalBase, adapter: Path, dtype: torch.dtype, directory: Path, tokenizer: Any = None) -> None:
    """Write a base with an adapter merged into it in fp32, saved in `dtype`. The default tokenizer is the base's.

    The end tokens that the adapter has learned are in a generation config next to it.

    Raises ForgeError if either cannot be loaded.
    """
    from peft import PeftModel  # takes two seconds to import

    causal = load_causal(base, torch.float32)
    try:
        if tokenizer is None:  # saved and loaded again, as training gets it from the data set
            load_tokenizer(base).save_pretrained(directory)
            tokenizer = load_tokenizer(LocalBase(str(directory)))
        merged = PeftModel.from_pretrained(causal, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ForgeError(f"cannot be merged into {base.location}: {reason}", where=f"adapter {adapter}") from None
    learned = adapter / GENERATION_CONFIG
    ends = json.loads(learned.read_text(encoding="utf-8"))["eos_token_id"] if learned.exists() else []
    save(merged, merged.state_dict(), dtype, tokenizer, directory, ends)
