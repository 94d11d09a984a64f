"""Experiments in MLflow."""

from pathlib import Path

import pytest

from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.mlflow_runs import experiment_id


# https://github.com/mlflow/mlflow/issues/2690
def test_a_deleted_experiment_is_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(home=tmp_path)
    client = open_registry(settings)
    first = experiment_id(client, "nightly", settings)
    assert experiment_id(client, "nightly", settings) == first
    client.delete_experiment(first)
    assert experiment_id(client, "nightly", settings) == first
    client.create_run(first)
    assert "restored the experiment nightly" in caplog.text
