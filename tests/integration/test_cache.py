"""What is recomputed when data or recipe change: Flyte's local cache, keyed by content."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import pytest
from flytekit import HashMethod, task, workflow
from flytekit.core.local_cache import LocalTaskCache

from forge.core.contracts import Base, Dataset, Source, cache_key
from forge.core.recipe import DataRecipe, Recipe
from forge.core.settings import load_settings
from forge.storage import open_store
from tasks.preprocess.sources import digest_source
from tasks.preprocess.task import preprocess_data
from tests.conftest import chat, write_jsonl


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(LocalTaskCache, "_initialized", False)


def preprocess(recipe: Recipe, path: Path) -> Dataset:
    """Run the task with the source as preflight names it."""
    digest = digest_source(recipe.data.model_copy(update={"source": str(path)}))
    source = Source(uri=path.as_uri(), digest=digest, store=open_store(load_settings()).identity)
    data = recipe.data.model_copy(update={"source": digest})

    @workflow
    def preprocess_rows(source: Source, data: DataRecipe) -> Dataset:
        return preprocess_data(source=identified(source=source), data=data, base=Base())

    return preprocess_rows(source=source, data=data)


@task
def identified(source: Source) -> Annotated[Source, HashMethod(cache_key)]:
    """Return the source as preflight does."""
    return source


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for part in range(3):
        write_jsonl(tmp_path / "rows" / f"{part}.jsonl", [chat(f"question {part} {n}", "answer") for n in range(100)])
    return tmp_path / "rows"


def test_same_rows_are_not_prepared_again(recipe: Recipe, rows: Path) -> None:
    first = preprocess(recipe, rows)
    shutil.rmtree(load_settings().store_root / "done")  # the stage's own records
    os.utime(rows / "0.jsonl", (0, 0))
    assert preprocess(recipe, rows) == first
    moved = rows.rename(rows.with_name("moved"))
    assert preprocess(recipe, moved) == first


def test_changed_file_in_a_directory_changes_the_data(recipe: Recipe, rows: Path) -> None:
    first = preprocess(recipe, rows)
    write_jsonl(rows / "1.jsonl", [chat(f"question 1 {n}", "another answer") for n in range(100)])
    second = preprocess(recipe, rows)
    assert second.started > first.started
    assert second.digest != first.digest


def test_changed_data_section_is_prepared_again(recipe: Recipe, rows: Path) -> None:
    first = preprocess(recipe, rows)
    wider = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_seq_len": 256})})
    assert preprocess(wider, rows).digest != first.digest


def test_results_of_a_deleted_store_are_not_reused(recipe: Recipe, rows: Path) -> None:
    first = preprocess(recipe, rows)
    shutil.rmtree(load_settings().home)
    second = preprocess(recipe, rows)
    assert second.digest == first.digest
    assert second.store != first.store
    assert open_store(load_settings()).path(second.uri).is_dir()
