"""Whole models: loaded from their base, saved in Hugging Face format, and made of a base and an adapter.

Training's export and evaluation's readers of an adapter merge by this one piece, and so get the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge.core.errors import ForgeError
from forge.registry.packages import LocalBase

SHARD = "5GB"  # of a safetensors file


def load_causal(base: LocalBase, dtype: torch.dtype, **how: Any) -> Any:
    """A base model with its weights; ForgeError where it cannot be loaded."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            base.location,
            revision=base.revision or None,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **how,
        )
    except (OSError, ValueError) as error:
        raise ForgeError(f"base model {base.location}: cannot be loaded: {str(error).splitlines()[0]}") from None


def save(causal: Any, weights: dict[str, Any], dtype: torch.dtype, tokenizer: Any, directory: Path) -> None:
    """Write weights, configuration and tokenizer in Hugging Face format."""
    tied = set(causal.all_tied_weights_keys or ())
    kept = {name: weight.to(dtype).contiguous() for name, weight in weights.items() if name not in tied}
    causal.save_pretrained(directory, state_dict=kept, max_shard_size=SHARD)
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"  # which has the dtype that the weights had while they were trained
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")


def merge(base: LocalBase, adapter: Path, dtype: torch.dtype, directory: Path, tokenizer: Any = None) -> None:
    """Write a base with an adapter merged into it (in fp32), saved in `dtype`; the tokenizer is the base's.

    Raises ForgeError where either cannot be loaded.
    """
    from peft import PeftModel  # takes two seconds to import, which only adapters need

    causal = load_causal(base, torch.float32)
    try:
        if tokenizer is None:  # saved and read once more: so training gets it, by way of the data set
            given = AutoTokenizer.from_pretrained(
                base.location, revision=base.revision or None, trust_remote_code=False
            )
            given.save_pretrained(directory)
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        merged = PeftModel.from_pretrained(causal, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ForgeError(f"adapter {adapter}: cannot be merged into {base.location}: {reason}") from None
    save(merged, merged.state_dict(), dtype, tokenizer, directory)
