"""The data set: the same for the same rows, split by group, and nothing cut."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tasks.contracts import Base, Dataset, Source
from tasks.errors import ForgeError, Problems
from tasks.preprocess import demonstration
from tasks.preprocess.prepare import prepare
from tasks.preprocess.rows import digest_source
from tasks.recipe import DataRecipe, Demonstration
from tasks.storage import DirectoryStore
from tests.conftest import chat, write_jsonl

ROWS = [chat(f"question {number}", f"answer {number}", group=str(number // 3)) for number in range(300)]


def prepare_rows(path: Path, rows: list, store: DirectoryStore, **options: object) -> Dataset:
    write_jsonl(path, rows)
    recipe = DataRecipe.model_validate({"source": str(path), "context": 128, "heldout_fraction": 0.1, **options})
    source = Source(uri=str(path), digest=digest_source(recipe), store=store.identity)
    return prepare(source, recipe, Base(), store)


def heldout(dataset: Dataset, store: DirectoryStore) -> list[dict]:
    return [json.loads(line) for line in (store.path(dataset.uri) / "heldout.jsonl").read_text().splitlines()]


def test_the_order_of_rows_changes_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    one, other = (prepare_rows(tmp_path / f"{n}.jsonl", rows, store) for n, rows in enumerate((ROWS, shuffled)))
    assert one.digest == other.digest
    changed = [*ROWS[:-1], chat("question 299", "another", group="99")]
    assert prepare_rows(tmp_path / "c.jsonl", changed, store).digest != one.digest


def test_groups_never_cross_and_new_rows_move_no_old_one(store: DirectoryStore, tmp_path: Path) -> None:
    before = prepare_rows(tmp_path / "a.jsonl", ROWS, store)
    held = heldout(before, store)
    assert before.train_rows + before.heldout_rows == len(ROWS)
    groups = {row["group"] for row in held}
    assert len(held) == 3 * len(groups) > 0
    more = [chat(f"new {number}", "x", group=f"new {number}") for number in range(100)]
    after = heldout(prepare_rows(tmp_path / "b.jsonl", [*ROWS, *more], store), store)
    assert [row for row in after if not row["group"].startswith("new")] == held


def test_arrays_hold_every_document_whole(store: DirectoryStore, tmp_path: Path) -> None:
    dataset = prepare_rows(tmp_path / "a.jsonl", ROWS, store)
    train = store.path(dataset.uri) / "train"
    tokens, trained, document = (
        np.load(train / f"{name}.npy", mmap_mode="r") for name in ("tokens", "trained", "document")
    )
    assert tokens.dtype == np.uint32
    assert sum(len(set(row[row > 0])) for row in np.asarray(document)) == dataset.train_rows
    assert not np.asarray(trained)[np.asarray(document) == 0].any()
    assert not np.asarray(tokens)[np.asarray(document) == 0].any()


def test_rows_that_change_while_they_are_read_are_refused(store: DirectoryStore, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    source = Source(uri=str(path), digest="another", store=store.identity)
    with pytest.raises(ForgeError, match="changed while they were read"):
        prepare(source, DataRecipe(source=str(path), context=128), Base(), store)


def test_a_row_over_the_context_is_named(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(Problems) as caught:
        prepare_rows(path, [*ROWS, chat("x" * 200, "y")], store)
    assert f"{path}:301: " in caught.value.message
    assert "data.context is 128" in caught.value.message


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:3]])
def test_too_few_rows_to_split(rows: list, store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="held out"):
        prepare_rows(tmp_path / "a.jsonl", rows, store)


def test_the_demonstration_is_always_the_same_and_has_no_prompt_twice() -> None:
    recipe = Demonstration(rows=2000)
    rows = list(demonstration.rows(recipe))
    assert rows == list(demonstration.rows(recipe))
    prompts = [row["messages"][0]["content"] for row in rows]
    assert len(set(prompts)) == len(prompts) > 1900
    assert {row["slice"] for row in rows} == set(recipe.locales)
    assert demonstration.digest(recipe) != demonstration.digest(Demonstration(rows=2001))
