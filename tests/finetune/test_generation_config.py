"""A trained model's generation config has the base's values, and the tokens that the model has learned to end with.

The bases are as in public bug reports of programs that do this job.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forge.core.recipe import EvaluationRecipe, ModelRecipe, TrainingRecipe
from forge.models.hub import GENERATION_CONFIG
from forge.registry.packages import LocalBase
from tasks.evaluate.answer import TransformersEngine
from tasks.finetune.export import export
from tasks.finetune.process_group import Rank
from tasks.finetune.train import Trainer, TrainingJob
from tests.finetune.job import CONFIGS, write_base, write_data

METHODS: list[dict[str, Any]] = [{"method": "full"}, {"method": "lora", "lora": {"rank": 4}}]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Packed rows whose turns end with token 1, and a base model."""
    directory = tmp_path_factory.mktemp("job")
    return write_data(directory / "data", rows=8), write_base(CONFIGS["llama"], directory / "base")


def train_one_step(places: tuple[Path, Path], generation: dict[str, Any], method: dict[str, Any], out: Path) -> Path:
    """Train a base with this generation config for a step; returns the exported model."""
    data, base = places
    (base / GENERATION_CONFIG).write_text(json.dumps(generation))
    common = {"global_batch_size": 8, "epochs": 1, "learning_rate": 0.01, "precision": "fp32"}
    recipe = TrainingRecipe.model_validate({**common, **method})
    job = TrainingJob(data, LocalBase(str(base)), ModelRecipe(base=str(base)), recipe, out / "checkpoints")
    trainer = Trainer(Rank(0, 1, torch.device("cpu")), job)
    trainer.train()
    export(trainer, out / "exported")
    return out / "exported" / "model"


@pytest.mark.parametrize("method", METHODS, ids=["full", "lora"])
def test_a_base_with_an_inconsistent_generation_config_is_trained_and_saved(
    method: dict[str, Any], places: tuple[Path, Path], tmp_path: Path
) -> None:
    """https://github.com/huggingface/transformers/issues/29988"""
    generation = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}
    model = train_one_step(places, generation, method, tmp_path)
    assert json.loads((model / GENERATION_CONFIG).read_text()).items() >= {"temperature": 0.9, "top_p": 0.6}.items()


@pytest.mark.parametrize("method", METHODS, ids=["full", "lora"])
def test_evaluation_stops_at_the_token_with_which_a_pretrained_base_learned_to_end_turns(
    method: dict[str, Any], places: tuple[Path, Path], tmp_path: Path
) -> None:
    """https://github.com/modelscope/ms-swift/issues/3113 and https://github.com/QwenLM/Qwen3/issues/927"""
    model = train_one_step(places, {"eos_token_id": 0, "max_new_tokens": 2048}, method, tmp_path)
    assert json.loads((model / GENERATION_CONFIG).read_text())["eos_token_id"] == [0, 1]
    assert TransformersEngine(LocalBase(str(model)), EvaluationRecipe(max_new_tokens=4), "cpu").ends == {0, 1}
