"""What is said, and given back, when the pipeline has failed."""

import json
from pathlib import Path

import pytest
import yaml
from flytekit.types.error.error import FlyteError

from tasks.recipe import Recipe
from tasks.registry import CHALLENGER, open_registry, version_of
from tasks.settings import load_settings
from tasks.storage import open_store
from tasks.storage.lease import whoami
from tasks.summary.task import tell_failure
from tests.conftest import SMALL
from tests.register.packages import inputs


@pytest.fixture
def execution(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod that Flyte started."""
    enter_execution(monkeypatch)


def enter_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables that Flyte gives its pods."""
    for part, value in {"ID": "f0123", "PROJECT": "homelab", "DOMAIN": "production"}.items():
        monkeypatch.setenv(f"FLYTE_INTERNAL_EXECUTION_{part}", value)


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    """The small recipe as a file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def fail(recipe: str, stage: str = "train", message: str = "rows are wrong: rows.jsonl:7") -> None:
    """What Flyte does at the end of a failed execution."""
    tell_failure(data_path="s3://datasets/x", recipe=recipe, err=FlyteError(message=message, failed_node_id=stage))


@pytest.mark.usefixtures("execution")
def test_on_the_cluster_it_says_where_why_and_how_to_go_on(recipe_file: str, capfd: pytest.CaptureFixture) -> None:
    fail(recipe_file)
    said = capfd.readouterr().out
    for part in (
        f"failed in train, given data_path 's3://datasets/x', recipe '{recipe_file}':\n  rows are wrong: rows.jsonl:7",
        "kubectl -n homelab-production logs -l execution-id=f0123",
        f"checkpoints: {load_settings().checkpoints}",
        "flytectl create execution -p homelab -d production --recover f0123",
    ):
        assert part in said
    assert "given back" not in said


@pytest.mark.parametrize("mine", [True, False])
def test_what_the_execution_holds_is_given_back_and_what_others_hold_is_not(
    mine: bool, tmp_path: Path, recipe: Recipe, recipe_file: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    settings = load_settings()
    store, client, claim = open_store(settings), open_registry(settings), "leases/promotion-dates/0123"
    if mine:
        enter_execution(monkeypatch)
    inputs(tmp_path, settings, recipe).register(settings)
    store.put(claim, json.dumps({"owner": whoami(), "number": 1, "renewals": 1}).encode())
    enter_execution(monkeypatch)
    fail(recipe_file)
    assert (store.read(claim) is None) is mine
    assert (version_of(client, "dates", CHALLENGER) is None) is mine
    said = capfd.readouterr().out
    for part in ("1 claim on the promotion of dates", "the alias challenger of dates version 1"):
        assert (f"given back: {part}" in said) is mine


@pytest.mark.usefixtures("execution")
def test_a_recipe_that_cannot_be_read_hides_nothing(capfd: pytest.CaptureFixture) -> None:
    fail("no-such-recipe", stage="preflight", message="recipe no-such-recipe: neither a shipped recipe nor a file")
    said = capfd.readouterr().out
    assert "failed in preflight" in said
    assert "given back: nothing more, for recipe no-such-recipe" in said


def test_here_it_says_what_can_be_gone_on_from(recipe_file: str, capfd: pytest.CaptureFixture) -> None:
    fail(recipe_file)
    assert capfd.readouterr().out == ""
    checkpoints = load_settings().checkpoints
    (checkpoints / "0123").mkdir(parents=True)
    fail(recipe_file)
    command = f"--data_path s3://datasets/x --recipe {recipe_file}"
    assert capfd.readouterr().out == f"The same command ({command}) goes on from the checkpoints in {checkpoints}\n"
