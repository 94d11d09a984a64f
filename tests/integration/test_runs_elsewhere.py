"""Runs from another directory, and two runs at once."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.core.digest import digest_directory
from tests.conftest import PROJECT, chat, write_jsonl
from tests.integration.harness import Home, stopped_afterwards

pytestmark = pytest.mark.long

ROWS = [chat(f"question {n}", f"answer {n}") for n in range(40)]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home with a recipe of few steps, whose model is rejected, so nothing is served."""
    with stopped_afterwards(Home(tmp_path / "home")) as home:
        home.write_recipe(
            data={"heldout_fraction": 0.2},
            training={"nproc_per_node": 1},
            gate={"min_score": 0.99},
        )
        yield home


def test_a_run_from_another_directory_takes_relative_paths_of_any_characters(home: Home, tmp_path: Path) -> None:
    """https://github.com/flyteorg/flyte/issues/2468"""
    place = tmp_path / "my räws, and more"
    rows = write_jsonl(place / "rows [1].jsonl", ROWS)
    recipe = (home.directory / "recipe.yaml").rename(place / "my recipe.yaml")
    pyflyte = Path(sys.executable).with_name("pyflyte")
    command = [pyflyte, "run", PROJECT / "workflows" / "training_pipeline.py", "training_pipeline"]
    done = subprocess.run(
        [*command, "--data_path", rows.name, "--recipe", recipe.name],
        cwd=place, env=home.environment, text=True, capture_output=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert home.facts()["verdict"] == "rejected"
    assert set(place.iterdir()) == {rows, recipe}


def test_two_runs_at_once_of_the_same_rows_give_the_same_model(home: Home, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    both = [home.start("--data_path", str(rows)) for _ in range(2)]
    for run in both:
        output, _ = run.communicate(timeout=400)
        assert run.returncode == 0, output
        assert "held-out prompts" in output
    (dataset,) = (home.settings.store_root / "datasets").iterdir()
    assert (dataset / "dataset.json").exists()
    trained = [digest_directory(path / "model")[0] for path in (home.settings.store_root / "trained").iterdir()]
    assert len(set(trained)) == 1
    assert not list(home.settings.store_root.glob(".staging/*"))
