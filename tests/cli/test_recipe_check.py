"""`forge check-recipe` of good and bad recipes."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.cli.command import error_of, forge
from tests.conftest import SMALL

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def write(path: Path, **sections: Any) -> str:
    """Write the small recipe with other sections; returns the path."""
    path.write_text(yaml.safe_dump({**SMALL, **sections}))
    return str(path)


def words(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def test_a_shipped_recipe_with_its_parallelism_and_memory(tmp_path: Path) -> None:
    done = forge("check-recipe", "tiny-cpu", home=tmp_path / "home", name_suffix="-development")
    assert done.returncode == 0, done.stderr
    shown = words(done.stdout)
    for part in (
        "tiny-cpu.yaml is valid",
        "dates-development",
        "0.7 M parameters",
        "ddp, on 1 node x 2 processes",
        "yes, 1x2",
    ):
        assert part in shown
    assert "8 rows = 1 node x 2 processes x micro batch 4 x accumulation 1" in shown
    assert "fits in" in shown
    assert not (tmp_path / "home").exists()


def test_a_base_model_in_a_directory_is_measured(tmp_path: Path) -> None:
    base = tmp_path / "llama"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA))
    training = {**SMALL["training"], "precision": "bf16"}
    recipe = write(tmp_path / "recipe.yaml", model={"base": str(base)}, training=training)
    done = forge("check-recipe", recipe, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "8,030.3 M parameters" in words(done.stdout)
    assert "does not fit in 38.0 GiB of A100-40GB" in words(done.stdout)


def test_a_base_model_that_is_not_here_is_not_downloaded(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", model={"base": "no-one/no-model"})
    done = forge("check-recipe", recipe, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "the config.json of no-one/no-model is not on this machine" in words(done.stdout)


def test_all_problems_have_their_lines(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    write(recipe)
    lines = recipe.read_text().replace("learning_rate: 0.004", "learning_rate: -1").replace("epochs:", "epoch:")
    recipe.write_text(lines)
    message = error_of(forge("check-recipe", str(recipe), home=tmp_path / "home"))
    for part in ("learning_rate: -1", "epoch: 1"):
        number = next(at for at, line in enumerate(lines.splitlines(), 1) if part in line)
        assert f"{recipe}:{number}: training.{part.partition(':')[0]}" in message
    assert "did you mean epochs?" in message


def test_a_shape_that_only_this_machine_can_run_is_valid_and_said_to_be_so(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", training={**SMALL["training"], "nodes": 2})
    done = forge("check-recipe", recipe, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "cluster no, the cluster has no Flyte task for this shape: take one of 1x1, 1x2, 2x2" in words(done.stdout)


def test_an_unknown_recipe(tmp_path: Path) -> None:
    assert "tiny-cpu" in error_of(forge("check-recipe", "tiny-gpu", home=tmp_path / "home"))
