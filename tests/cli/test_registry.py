"""`forge history|lineage|fetch|rollback|prune|ui` on a small registry."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.promotion import promote
from forge.storage import open_store
from tests.cli.command import error_of, forge
from tests.register.packages import inputs


@pytest.fixture
def settings(tmp_path: Path, recipe: Recipe) -> Settings:
    """Settings of a registry with three versions of dates, the second of which is the champion."""
    settings = Settings(home=tmp_path / "home")
    for number in range(1, 4):
        inputs(tmp_path, settings, recipe, seed=bytes([number])).register(settings)
    promote(open_registry(settings), open_store(settings), "dates", "2", "", "better")
    return settings


def run(*command: str, status: int = 0) -> str:
    """What a command prints, in this process."""
    result = CliRunner().invoke(main, command)
    assert result.exit_code == status, result.output
    return result.output


def test_an_empty_registry(tmp_path: Path) -> None:
    assert "words" in error_of(forge("rollback", "words", home=tmp_path / "home"))
    assert "words: no such registered model" in run("history", "words", status=1)
    for command in (["lineage", "models:/words@champion"], ["fetch", "models:/words/1"], ["prune", "words"]):
        assert "words" in run(*command, status=1)
    assert "0 packages" in run("prune")


def test_a_registry_with_a_champion(settings: Settings) -> None:
    shown = forge("history", "dates", home=settings.home).stdout
    assert "dates: 3 versions" in shown
    assert "champion" in shown
    shown = run("lineage", "models:/dates@champion")
    assert "dates version 2" in shown
    assert "rows from: s3://team/raw" in shown
    assert (Path(run("fetch", "models:/dates/1").strip()) / "manifest.json").is_file()
    assert "no other version of dates" in error_of(forge("rollback", "dates", home=settings.home))


def test_prune_changes_nothing_without_apply(settings: Settings) -> None:
    client = open_registry(settings)
    assert "0 packages" in run("prune", "dates"), "all are among the last ten"
    for options, left in (((), {"1", "2", "3"}), (("--apply",), {"2", "3"})):
        assert "1 package" in run("prune", "dates", "--keep", "1", "--days", "0", *options)
        assert {str(version.version) for version in client.search_model_versions("name = 'dates'")} == left


def test_ui_serves_the_embedded_registry_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    assert "http://127.0.0.1:5001" in run("ui", "--port", "5001")
    assert started[0][1:4] == ["-m", "mlflow", "ui"]
    assert (tmp_path / "home" / "mlflow" / "mlflow.db").exists()
    monkeypatch.setenv("FORGE_MLFLOW_URI", "http://mlflow:5000")
    assert "open http://mlflow:5000" in run("ui", status=1)
