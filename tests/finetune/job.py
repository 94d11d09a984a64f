"""Training jobs for the tests: generated packed rows, and models of several architectures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from forge.models.chat import byte_tokenizer

PROJECT = Path(__file__).parents[2]
CONTEXT, VOCABULARY = 64, 262
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    # with the default of 0.02, so small a model cannot distinguish tokens
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, sliding_window=8, head_dim=16),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**SMALL, sliding_window=None),
}


def write_base(config: Any, directory: Path, seed: int = 0) -> Path:
    """Write a base model with random weights."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer(CONTEXT).save_pretrained(directory)
    return directory


def write_data(directory: Path, rows: int = 48, seed: int = 0) -> Path:
    """Packed rows that can be learned: most tokens are the successor of the one before."""
    rng = np.random.default_rng(seed)
    for side, count in (("train", rows), ("heldout", 8)):
        tokens = rng.integers(6, VOCABULARY, (count, CONTEXT))
        for place in range(1, CONTEXT):
            follows = rng.random(count) < 0.8
            tokens[follows, place] = 6 + (tokens[follows, place - 1] - 5) % (VOCABULARY - 6)
        document = 1 + np.cumsum(rng.random((count, CONTEXT)) < 0.08, axis=1)
        document[:, -4:] = 0  # padding
        trained = (rng.random((count, CONTEXT)) < 0.7) & (document > 0)
        trained[:, 0] = False
        trained[:, 1:] &= document[:, 1:] == document[:, :-1]
        shard = directory / side / "00000"
        shard.mkdir(parents=True)
        np.save(shard / "tokens.npy", tokens.astype(np.uint32))
        np.save(shard / "trained.npy", trained)
        np.save(shard / "document.npy", document.astype(np.uint16))
    byte_tokenizer(CONTEXT).save_pretrained(directory / "tokenizer")
    (directory / "dataset.json").write_text(
        json.dumps({"digest": "made", "context": CONTEXT, "end_tokens": ["<|end|>"]})
    )
    return directory


def write_recipe(path: Path, base: Path | None = None, **training: Any) -> Path:
    """Write a recipe with a few steps."""
    architecture = {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 64}
    recipe = {
        "name": "job",
        "data": {"max_seq_len": CONTEXT},
        "model": {"base": str(base)} if base else {"architecture": architecture},
        "training": {"global_batch_size": 8, "epochs": 2, "learning_rate": 0.01, "precision": "fp32", **training},
        "evaluation": {"max_new_tokens": 8},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path, data: Path, out: Path, processes: int) -> subprocess.Popen:
    """Start training with torchrun, in a session of its own."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.Popen(
        [*program, "-m", "tasks.finetune", "--recipe", str(recipe), "--data", str(data), "--out", str(out)],
        cwd=PROJECT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(recipe: Path, data: Path, out: Path, processes: int) -> str:
    """Train to the end; returns the output."""
    process = start(recipe, data, out, processes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def curve(out: Path) -> list[dict[str, float]]:
    """The loss curve in a run's card."""
    points: list[dict[str, float]] = json.loads((out / "training.json").read_text())["curve"]
    return points
