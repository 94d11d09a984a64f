"""Only accepted rows are counted, and odd rows neither stop nor break the reader."""

from pathlib import Path

import pytest

from forge.core.errors import ForgeError
from forge.storage import DirectoryStore
from tests.conftest import chat, write_jsonl
from tests.preprocess.datasets import card_of, prepare_file


def test_messages_and_columns_of_rejected_rows_are_not_counted(store: DirectoryStore, tmp_path: Path) -> None:
    def merged(number: int, answer: str) -> dict:
        question, answered = chat(f"question {number}", answer)["messages"]
        return {"messages": [question, {"role": "user", "content": "please"}, answered], f"column {answer[:1]}": "x"}

    rejected = [merged(40, "z" * 500), merged(41, "y<|end|>"), merged(42, "v AKIA" + "ABCDEFGH12345678")]
    rows = [*(merged(number, "a") for number in range(40)), *rejected]
    dataset = prepare_file(write_jsonl(tmp_path / "a.jsonl", rows), store, turns="merge", max_reject_fraction=0.5)
    card = card_of(dataset, store)
    assert sum(card["rejected"].values()) == len(rejected)
    assert card["turns"] == {"merged with the message before": 40}
    assert card["ignored_columns"] == {"column a": 40}


@pytest.mark.parametrize("text", ["x" * 300, "a " + "x" * 300, "x" * 300 + " ", " " + "x" * 300])
def test_a_long_text_without_a_place_to_split_is_rejected(text: str, store: DirectoryStore, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    with pytest.raises(ForgeError, match=r"one turn alone is 30\d tokens long"):
        prepare_file(path, store, overlong="split")


@pytest.mark.long
def test_more_slices_than_a_block_can_number_are_one_error(store: DirectoryStore, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "slice": number} for number in range(70_000)])
    with pytest.raises(ForgeError, match="more than 1000 values"):
        prepare_file(path, store)
