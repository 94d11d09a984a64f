"""A model's answers are scored as the model wrote them."""

import json
from pathlib import Path

from forge.core.recipe import EvaluationRecipe
from forge.registry.packages import LocalBase
from tasks.evaluate.answer import TransformersEngine
from tests.finetune.job import CONFIGS, write_base


def test_decoding_keeps_spaces_before_punctuation_whatever_the_tokenizer_config_says(tmp_path: Path) -> None:
    """https://github.com/huggingface/transformers/issues/44914"""
    path = write_base(CONFIGS["llama"], tmp_path / "base") / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": True}))
    engine = TransformersEngine(LocalBase(str(path.parent)), EvaluationRecipe(max_new_tokens=4), "cpu")
    assert engine.tokenizer.clean_up_tokenization_spaces
    text = "a , b . it 's x != y ?"
    assert engine.text(engine.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
