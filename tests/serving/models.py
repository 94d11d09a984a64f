"""A tiny random base with a byte-level tokenizer, and random adapters of it, as packages in a store."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from forge.core.contracts import Base
from forge.models.chat import load_tokenizer
from forge.serving.desired import Served
from forge.storage import DirectoryStore

CONTEXT = 512


def write_base(directory: Path, hidden: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """A Llama with random weights of a large variance, so that greedy answers don't depend on rounding."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(Base(), CONTEXT)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_adapter(directory: Path, base: Path, rank: int = 8, seed: int = 1) -> Path:
    """An adapter of all the linear layers of a base, with random weights that change its answers."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": ""}))
    return directory


def publish(store: DirectoryStore, directory: Path, name: str, version: int, base: Served | None = None) -> Served:
    """Publish a directory as a package, of an adapter if a base is given."""
    facts: dict = {"name": name, "kind": "model"}
    if base is not None:
        facts |= {"kind": "adapter", "base": {"location": base.uri, "revision": base.digest}}
    with store.stage() as staged:
        for path in directory.iterdir():
            (staged / path.name).write_bytes(path.read_bytes())
        uri = store.publish(staged, f"models/{name}", facts=facts)
    return Served(name=name, version=str(version), uri=uri, digest=uri.rpartition("sha256-")[2])
