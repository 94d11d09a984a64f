"""The replay of evaluated prompts. On a real vLLM: tests/integration/test_serving.py."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from forge.core.recipe import ServingRecipe
from tasks.rollout.prove import prove
from tests.serving.stand import Stand


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Three prompts, with the answers that the fake vLLM gives."""
    row = {
        "messages": json.dumps([{"role": "user", "content": "Who are you?"}]), "tools": None, "scored": [],
        "candidate_answer": "I am one", "candidate_nll": None, "prompt_tokens": [], "whole_tokens": [],
    }  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([row] * 3), tmp_path / "items.parquet")
    (tmp_path / "evaluation.json").write_text(json.dumps({"recipe": {"max_new_tokens": 8}}))
    return tmp_path


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    stand = Stand(tmp_path / "names.json")
    stand.base = "one"
    yield stand
    stand.http.shutdown()
    stand.http.server_close()


def test_the_prompts_of_the_evaluation_are_replayed(evaluation: Path, stand: Stand) -> None:
    assert prove(f"{stand.url}/v1", "one", evaluation, ServingRecipe()) == "3 of 3"


def test_the_check_ends_the_proof_before_the_next_request(evaluation: Path, stand: Stand) -> None:
    questions: list[str] = []
    stand.asked = lambda: questions.append("a question")

    def check() -> None:
        if questions:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(f"{stand.url}/v1", "one", evaluation, ServingRecipe(), check)
    assert questions == ["a question"]
