"""Preflight finds what is wrong with a base model before anything is prepared for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.core.digest import digest_directory
from forge.core.errors import ForgeError
from forge.core.recipe import ModelRecipe, Recipe
from forge.models.chat import byte_tokenizer
from forge.registry.packages import LocalBase
from tasks.preflight.model_checks import check_trainable_base, find_base, trained_config
from tests.conftest import SMALL
from tests.finetune.job import CONFIGS, CONTEXT, write_base

LORA = {**SMALL["training"], "method": "lora", "lora": {"rank": 4}}
END = byte_tokenizer(CONTEXT).eos_token_id


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(CONFIGS["llama"], tmp_path / "base")


def check(base: Path, **sections: Any) -> None:
    """Check a base for the small recipe with other sections."""
    sections = {"data": {"max_seq_len": CONTEXT}, "evaluation": {"max_new_tokens": 8}, **sections}
    recipe = Recipe.model_validate({**SMALL, "model": {"base": str(base)}, "serving": {"rollout": True}, **sections})
    local = LocalBase(str(base))
    check_trainable_base(recipe, local, trained_config(recipe, local))


def edit(base: Path, file: str, **values: Any) -> None:
    path = base / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda base: (base / file).write_bytes(content) and None


@pytest.mark.parametrize("training", [SMALL["training"], LORA])
def test_a_whole_base_passes(training: dict[str, Any], base: Path) -> None:
    check(base, training=training)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
            "model.safetensors: is a git-lfs pointer, not the weights; run git lfs pull",
        ),
        (write("model.safetensors", b"\x10"), "model.safetensors: is damaged"),
        (
            lambda base: edit(base, "generation_config.json", num_return_sequences=2),
            "generation_config.json: cannot be used (",
        ),
        # https://github.com/huggingface/tokenizers/issues/1297
        (write("tokenizer.json", b"{}"), "the tokenizer cannot be loaded"),
        (
            lambda base: edit(base, "config.json", vocab_size=100),
            "its tokenizer has token 261, and its embeddings end at 99 (vocab_size)",
        ),
        (
            lambda base: edit(base, "config.json", max_position_embeddings=32),
            "has 32 positions, and data.max_seq_len is 64; set data.max_seq_len to 32 or less",
        ),
        (
            lambda base: edit(base, "config.json", quantization_config={"quant_method": "awq"}),
            "its weights are quantised already (awq); name the original model",
        ),
    ],
)
def test_a_base_that_cannot_be_trained(damage: Callable[[Path], None], says: str, base: Path) -> None:
    damage(base)
    with pytest.raises(ForgeError) as caught:
        check(base)
    assert says in caught.value.message
    assert str(base) in caught.value.message


def test_an_adapter_needs_a_base_whose_server_stops_at_its_end_token(base: Path) -> None:
    """A pretrained base whose eos_token is not the one that its chat template ends turns with."""
    edit(base, "tokenizer_config.json", eos_token="<|pad|>")
    edit(base, "generation_config.json", eos_token_id=0)
    check(base)
    check(base, training=LORA, serving={"rollout": False})
    with pytest.raises(ForgeError, match=rf"ends turns with <\|end\|>, .*add {END} to eos_token_id there") as caught:
        check(base, training=LORA)
    assert "their answers would never end" in caught.value.message
    edit(base, "generation_config.json", eos_token_id=[0, END])
    check(base, training=LORA)


def test_without_a_generation_config_servers_stop_at_the_end_tokens_of_the_config(base: Path) -> None:
    edit(base, "tokenizer_config.json", eos_token="<|pad|>")
    (base / "generation_config.json").unlink()
    edit(base, "config.json", eos_token_id=[0, END])
    check(base, training=LORA)


def test_a_base_needs_a_chat_template_whatever_is_trained(base: Path) -> None:
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ForgeError, match=r"there is no chat template; add chat_template\.jinja"):
        check(base)


def test_positions_include_the_factor_of_their_scaling(base: Path) -> None:
    edit(base, "config.json", max_position_embeddings=32, rope_parameters={"rope_type": "linear", "factor": 4.0})
    check(base)


def test_the_files_of_an_index_must_be_there_and_others_do_not_matter(base: Path) -> None:
    (base / "consolidated.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    edit(base, "model.safetensors.index.json", weight_map={"a": "model.safetensors"})
    check(base)
    edit(base, "model.safetensors.index.json", weight_map={"a": "model.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(ForgeError, match=r"model-2\.safetensors: is missing; copy it again"):
        check(base)


# https://github.com/huggingface/huggingface_hub/issues/2262
def test_what_tools_keep_next_to_a_base_makes_it_no_other_base(base: Path) -> None:
    revision = find_base(ModelRecipe(base=str(base))).revision
    assert revision == digest_directory(base)[0]
    for name in (".cache/huggingface/download/config.json.metadata", ".git/HEAD"):
        (base / name).parent.mkdir(parents=True)
        (base / name).write_text("1764999999.0")
    assert find_base(ModelRecipe(base=str(base))).revision == revision
    edit(base, "config.json", note="changed")
    assert find_base(ModelRecipe(base=str(base))).revision != revision
