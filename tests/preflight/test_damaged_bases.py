"""Preflight reports a base that could not be trained. The bases are as in public bug reports of other programs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config

from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.storage import DirectoryStore
from tasks.preflight.checks import Checks, check_model
from tests.conftest import SMALL
from tests.finetune.job import CONFIGS, CONTEXT, write_base


def lfs_pointer(folder: Path) -> Path:
    """https://github.com/huggingface/transformers/issues/27923"""
    base = write_base(CONFIGS["llama"], folder)
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    return base


def few_embeddings(folder: Path) -> Path:
    """https://github.com/huggingface/transformers/issues/11102"""
    base = write_base(CONFIGS["llama"], folder)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    return base


def learned_positions(folder: Path) -> Path:
    """https://github.com/huggingface/transformers/issues/12763"""
    ends = {"bos_token_id": None, "eos_token_id": 1}
    return write_base(GPT2Config(vocab_size=262, n_positions=32, n_embd=32, n_layer=1, n_head=2, **ends), folder)


def quantised(folder: Path) -> Path:
    """https://github.com/axolotl-ai-cloud/axolotl/issues/2511"""
    base = write_base(CONFIGS["llama"], folder)
    config = json.loads((base / "config.json").read_text())
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return base


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lfs_pointer, "model.safetensors: is a git-lfs pointer"),
        (few_embeddings, "its tokenizer has token 261, and its embeddings end at 199"),
        (learned_positions, "has 32 positions, and data.max_seq_len is 64"),
        (quantised, "its weights are quantised already (bitsandbytes)"),
    ],
)
def test_preflight_reports_a_base_that_cannot_be_trained(
    make: Callable[[Path], Path], says: str, store: DirectoryStore, tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    serving = {"rollout": False}
    sections = {"model": {"base": str(base)}, "data": {"max_seq_len": CONTEXT}, "serving": serving}
    checks = Checks()
    check_model(checks, Recipe.model_validate({**SMALL, **sections}), Settings(home=tmp_path), store)
    (problem,) = checks.problems
    assert says in problem
    assert str(base) in problem
