"""Complete models: loaded, saved in Hugging Face format, and merged from a base and an adapter.

Training's export and evaluation merge adapters with the same function, and so get the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from forge.core.errors import ForgeError
from forge.models.chat import load_tokenizer
from forge.registry.packages import LocalBase

SHARD = "5GB"  # maximum size of a safetensors file


def load_causal(base: LocalBase, dtype: torch.dtype, **options: Any) -> Any:
    """A causal language model with its weights; raises ForgeError if it cannot be loaded."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            base.location,
            revision=base.revision or None,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(f"cannot be loaded: {reason}", where=f"base model {base.location}") from None


def save(causal: Any, weights: dict[str, Any], dtype: torch.dtype, tokenizer: Any, directory: Path) -> None:
    """Write weights, configuration and tokenizer in Hugging Face format."""
    tied = set(causal.all_tied_weights_keys or ())
    kept = {name: weight.to(dtype).contiguous() for name, weight in weights.items() if name not in tied}
    causal.save_pretrained(directory, state_dict=kept, max_shard_size=SHARD)
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"  # has the dtype of training
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")


def merge(base: LocalBase, adapter: Path, dtype: torch.dtype, directory: Path, tokenizer: Any = None) -> None:
    """Write a base with an adapter merged into it in fp32, saved in `dtype`. The default tokenizer is the base's.

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
    save(merged, merged.state_dict(), dtype, tokenizer, directory)
