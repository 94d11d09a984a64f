"""Rows of which nothing could be evaluated are an error before training, which says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.core.contracts import Base
from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.models.chat_format import chat_format
from forge.storage import DirectoryStore
from tasks.preflight.data_checks import check_data
from tests.conftest import write_jsonl
from tests.models.families import call, conversation, tokenizer_of
from tests.preprocess.datasets import prepare_file


def with_reasoning(n: int) -> list[dict[str, Any]]:
    """https://github.com/THUDM/slime/issues/330"""
    question, answer = conversation(f"q {n}", "b")
    return [question, {**answer, "reasoning_content": "since"}]


def with_call(n: int) -> list[dict[str, Any]]:
    return [*conversation(f"q {n}"), {"role": "assistant", "content": "", "tool_calls": [call()]}]


def with_wrong_answer(n: int) -> list[dict[str, Any]]:
    messages = conversation(f"q {n}", "b", "c", "d")
    return [*messages[:3], {**messages[3], "weight": 0}]


@pytest.mark.parametrize(
    ("messages", "family"), [(with_reasoning, "qwen-3"), (with_call, "qwen-2.5"), (with_wrong_answer, "qwen-2.5")]
)
def test_rows_without_an_answer_that_can_be_scored_are_an_error(
    messages: Callable[[int], list], family: str, store: DirectoryStore, tmp_path: Path
) -> None:
    tokenizer_of(family).save_pretrained(tmp_path / "base")
    base = Base(location=(tmp_path / "base").as_uri())
    rows = [{"messages": messages(n)} for n in range(20)]
    with pytest.raises(ForgeError, match=r"none of the \d+ held-out documents .* can be scored: .*heldout_source"):
        prepare_file(write_jsonl(tmp_path / "rows.jsonl", rows), store, base, max_seq_len=512)
    assert not store.exists("datasets")
    source = DataRecipe(source=(tmp_path / "rows.jsonl").as_uri(), max_seq_len=512)
    with pytest.raises(ForgeError, match=r"no row has an answer that can be scored: .*heldout_source"):
        check_data(source)
    rows += [{"messages": conversation(f"{n}", "b")} for n in range(20)]
    prepare_file(write_jsonl(tmp_path / "rows.jsonl", rows), store, base, max_seq_len=512)
    check_data(source)


def test_rows_that_all_begin_alike_are_one_group_and_the_error_says_so(store: DirectoryStore, tmp_path: Path) -> None:
    """https://github.com/scikit-learn/scikit-learn/issues/9297"""
    rows = [{"messages": conversation("Begin.", "What?", f"{n}", "Right.")} for n in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ForgeError, match=r"group, or without one the same first question, stay.*data\.group_column"):
        prepare_file(path, store)
    rows = [{**row, "id": n} for n, row in enumerate(rows)]
    prepare_file(write_jsonl(tmp_path / "rows.jsonl", rows), store, group_column="id")


def test_preflight_renders_the_first_rows_with_the_chat_template_of_the_base(tmp_path: Path) -> None:
    rows = [{"messages": [*conversation(f"q {n}", "b", "c"), {**with_reasoning(n)[1]}]} for n in range(20)]
    source = DataRecipe(source=write_jsonl(tmp_path / "rows.jsonl", rows).as_uri(), max_seq_len=512)
    form = chat_format(tokenizer_of("llama-3"), "base model")
    with pytest.raises(ForgeError, match=r"20 of 20 rows cannot be used:\n.*leaves out the row's reasoning_content"):
        check_data(source, form)
