"""Every evaluation is a run in MLflow, whatever its verdict: metrics, verdict and report."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from forge.core.contracts import Evaluation
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry, translate_mlflow_errors
from forge.registry.mlflow_runs import MAX_TEXT, evaluation_experiment, experiment_id, metrics_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST = "forge.evaluation"  # tag with the evaluation's digest, by which its run is found


def record_evaluation(
    settings: Settings,
    name: str,
    evaluation: Evaluation,
    tags: Mapping[str, str],
    more: Mapping[str, float],
    report: Path,
) -> None:
    """Record an evaluation as a run, unless there is one already; `more` are further metrics.

    Raises ForgeError if MLflow rejects it.
    """
    client = open_registry(settings)
    with translate_mlflow_errors(f"the evaluation {evaluation.uri} could not be recorded", settings):
        experiment = experiment_id(client, evaluation_experiment(settings), settings)
        runs = client.search_runs([experiment], f"tags.`{DIGEST}` = '{evaluation.digest}'")
        if any(run.info.status == "FINISHED" for run in runs):
            return
        for run in runs:  # left unfinished by an interrupted attempt
            client.delete_run(run.info.run_id)
        verdict = {"verdict": evaluation.verdict, "reason": evaluation.reason[:MAX_TEXT], "model": name}
        metrics = {"items": evaluation.items, **metrics_of(evaluation), **more}
        record(client, settings, name, {DIGEST: evaluation.digest, **verdict, **tags}, metrics, report)


def record(
    client: "MlflowClient",
    settings: Settings,
    run_name: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    report: Path | None = None,
) -> None:
    """Write a run of the evaluation experiment; its status is FINISHED once it is complete."""
    experiment = experiment_id(client, evaluation_experiment(settings), settings)
    run_id = str(client.create_run(experiment, tags=dict(tags), run_name=run_name).info.run_id)
    for key, value in metrics.items():
        client.log_metric(run_id, key, value)
    if report:
        client.log_artifact(run_id, str(report))
    client.set_terminated(run_id)
