"""The proof's rows; on a real vLLM: tests/integration/test_serving.py."""

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
    """Three prompts, answered as the stand-in answers."""
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


def test_it_is_asked_what_evaluation_asked(evaluation: Path, stand: Stand) -> None:
    assert prove(f"{stand.url}/v1", "one", evaluation, ServingRecipe()) == "3 of 3"


def test_a_proof_that_may_not_go_on_asks_no_more(evaluation: Path, stand: Stand) -> None:
    asked: list[str] = []
    stand.asked = lambda: asked.append("a question")

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(f"{stand.url}/v1", "one", evaluation, ServingRecipe(), check)
    assert asked == ["a question"]
