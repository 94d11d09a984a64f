"""The messages of a failed pipeline."""

from pathlib import Path

import pytest
import yaml
from flytekit.types.error.error import FlyteError

from forge.core.settings import load_settings
from tasks.summary.task import report_failure
from tests.conftest import SMALL


@pytest.fixture
def execution(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod that Flyte started."""
    for part, value in {"ID": "f0123", "PROJECT": "homelab", "DOMAIN": "production"}.items():
        monkeypatch.setenv(f"FLYTE_INTERNAL_EXECUTION_{part}", value)


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    """The small recipe as a file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def fail(recipe: str, stage: str = "train", message: str = "rows are wrong: rows.jsonl:7") -> None:
    """Run the failure task, as Flyte does at the end of a failed execution."""
    report_failure(data_path="s3://datasets/x", recipe=recipe, err=FlyteError(message=message, failed_node_id=stage))


@pytest.mark.usefixtures("execution")
def test_on_a_cluster_it_reports_stage_error_and_next_step(recipe_file: str, capfd: pytest.CaptureFixture) -> None:
    fail(recipe_file)
    printed = capfd.readouterr().out
    for part in (
        f"failed in train, with data_path 's3://datasets/x', recipe '{recipe_file}':\n  rows are wrong: rows.jsonl:7",
        "kubectl -n homelab-production logs -l execution-id=f0123",
        f"checkpoints: {load_settings().checkpoints}",
        "flytectl create execution -p homelab -d production --recover f0123",
    ):
        assert part in printed


@pytest.mark.usefixtures("execution")
def test_the_stack_trace_is_left_out(recipe_file: str, capfd: pytest.CaptureFixture) -> None:
    trace = "Trace:\n\n    Traceback (most recent call last):\n      File x\n\n"
    trace += "Message:\n\n    ForgeError: rows are wrong\n    a.jsonl:7"
    fail(recipe_file, message=trace)
    assert f"recipe '{recipe_file}':\n  rows are wrong\n  a.jsonl:7\nlogs:" in capfd.readouterr().out


@pytest.mark.usefixtures("execution")
def test_a_recipe_given_as_yaml_is_not_repeated(capfd: pytest.CaptureFixture) -> None:
    fail("name: dates\ndata: {}\n", stage="preflight", message="data.max_seq_len is missing; add it")
    assert "failed in preflight, with data_path 's3://datasets/x', recipe as YAML:" in capfd.readouterr().out


def test_on_this_machine_it_names_the_checkpoints(recipe_file: str, capfd: pytest.CaptureFixture) -> None:
    fail(recipe_file)
    assert capfd.readouterr().out == ""
    checkpoints = load_settings().checkpoints
    (checkpoints / "0123").mkdir(parents=True)
    fail(recipe_file)
    command = f"--data_path s3://datasets/x --recipe {recipe_file}"
    assert capfd.readouterr().out == f"The same command ({command}) resumes from the checkpoints in {checkpoints}\n"
