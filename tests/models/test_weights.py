"""What is written of a model besides its weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from forge.core.errors import ForgeError
from forge.models.chat import byte_tokenizer
from forge.models.hub import GENERATION_CONFIG
from forge.models.weights import load_causal, save
from forge.registry.packages import LocalBase
from tests.finetune.job import CONFIGS, CONTEXT, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(CONFIGS["llama"], tmp_path_factory.mktemp("base"))


def saved(base: Path, generation: dict[str, Any], ends: list[int], directory: Path) -> dict[str, Any]:
    """The generation config that is saved of a base with this one."""
    (base / GENERATION_CONFIG).write_text(json.dumps(generation))
    causal = AutoModelForCausalLM.from_pretrained(base)
    save(causal, causal.state_dict(), torch.float32, byte_tokenizer(CONTEXT), directory, ends)
    assert AutoModelForCausalLM.from_pretrained(directory).generation_config is not None
    return json.loads((directory / GENERATION_CONFIG).read_text())


@pytest.mark.parametrize(
    ("known", "ends", "together"), [(0, [1], [0, 1]), ([0, 2], [1, 2], [0, 2, 1]), (1, [1], 1), (0, [], 0)]
)
def test_the_end_tokens_are_those_of_the_base_and_those_it_has_learned(
    known: object, ends: list[int], together: object, base: Path, tmp_path: Path
) -> None:
    assert saved(base, {"eos_token_id": known}, ends, tmp_path)["eos_token_id"] == together


def test_a_generation_config_that_transformers_would_not_save_is_kept(base: Path, tmp_path: Path) -> None:
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig(**odd).save_pretrained(tmp_path)
    assert saved(base, odd, [1], tmp_path).items() >= {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}.items()


DOWN = "model.layers.1.mlp.down_proj.weight"


# https://github.com/huggingface/transformers/issues/48722
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop(DOWN), f"its files lack {DOWN}; copy it again"),
        (
            lambda weights: weights.update({"other.weight": torch.ones(2)}),
            "that the model does not have: other.weight;",
        ),
    ],
)
def test_a_base_with_other_weights_than_its_config_says_is_an_error(change: Any, says: str, tmp_path: Path) -> None:
    base = write_base(CONFIGS["llama"], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ForgeError) as caught:
        load_causal(LocalBase(str(base)), torch.float32)
    assert says in caught.value.message


def test_the_weights_of_every_family_are_those_of_its_config(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        load_causal(LocalBase(str(write_base(config, tmp_path / name))), torch.float32)
