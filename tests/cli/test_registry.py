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


def test_an_empty_registry(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "words: no such registered model" in error_of(forge("history", "words", home=home))
    assert "words" in error_of(forge("rollback", "words", home=home))
    for command in (["lineage", "models:/words@champion"], ["fetch", "models:/words/1"], ["prune", "words"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert "words" in result.output
    result = CliRunner().invoke(main, ["prune"])
    assert (result.exit_code, "0 packages" in result.output) == (0, True)


def test_a_registry_with_a_champion(settings: Settings) -> None:
    home = settings.home
    shown = forge("history", "dates", home=home).stdout
    assert "dates: 3 versions" in shown
    assert "champion" in shown
    shown = forge("lineage", "models:/dates@champion", home=home).stdout
    assert "dates version 2" in shown
    assert "rows from: s3://team/raw" in shown
    fetched = forge("fetch", "models:/dates/1", home=home).stdout.strip()
    assert (Path(fetched) / "manifest.json").is_file()
    assert "no other version of dates" in error_of(forge("rollback", "dates", home=home))


def test_prune_changes_nothing_without_apply(settings: Settings) -> None:
    home, client = settings.home, open_registry(settings)
    assert "0 packages" in forge("prune", "dates", home=home).stdout, "all are among the last ten"
    for options, left in (((), {"1", "2", "3"}), (("--apply",), {"2", "3"})):
        done = forge("prune", "dates", "--keep", "1", "--days", "0", *options, home=home)
        assert done.returncode == 0, done.stderr
        assert "1 package" in done.stdout
        assert {str(version.version) for version in client.search_model_versions("name = 'dates'")} == left


def test_ui_serves_the_embedded_registry_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    result = CliRunner().invoke(main, ["ui", "--port", "5001"])
    assert result.exit_code == 0, result.output
    assert "http://127.0.0.1:5001" in result.output
    assert started[0][1:4] == ["-m", "mlflow", "ui"]
    assert (tmp_path / "home" / "mlflow" / "mlflow.db").exists()
    monkeypatch.setenv("FORGE_MLFLOW_URI", "http://mlflow:5000")
    result = CliRunner().invoke(main, ["ui"])
    assert result.exit_code == 1
    assert "open http://mlflow:5000" in result.output
