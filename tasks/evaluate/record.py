"""Every evaluation is a run in MLflow, whatever its verdict: figures, verdict and report."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from forge.core.contracts import Evaluation
from forge.core.settings import Settings
from forge.registry.mlflow_registry import artifact_root, open_registry, translate_mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "forge-evaluation"
DIGEST = "forge.evaluation"  # the tag that an evaluation's run is found by
FIGURES = ("items", "score", "score_base", "score_champion", "exact_match", "nll", "nll_base", "json_validity")


def record_evaluation(
    settings: Settings,
    name: str,
    evaluation: Evaluation,
    tags: Mapping[str, str],
    more: Mapping[str, float],
    report: Path,
) -> None:
    """Write an evaluation's run, once; ForgeError where MLflow does not take it."""
    client = open_registry(settings)
    with translate_mlflow_errors(f"the evaluation {evaluation.uri} could not be recorded", settings):
        _record_once(client, settings, name, evaluation, tags, more, report)


def _record_once(
    client: "MlflowClient",
    settings: Settings,
    name: str,
    evaluation: Evaluation,
    tags: Mapping[str, str],
    more: Mapping[str, float],
    report: Path,
) -> None:
    found = client.search_runs([experiment_id(client, settings)], f"tags.`{DIGEST}` = '{evaluation.digest}'")
    if any(run.info.status == "FINISHED" for run in found):
        return
    for run in found:
        client.delete_run(run.info.run_id)
    verdict = {"verdict": evaluation.verdict, "reason": evaluation.reason[:4000], "model": name}
    figures = {key: value for key in FIGURES if (value := getattr(evaluation, key)) is not None}
    record(client, settings, name, {DIGEST: evaluation.digest, **verdict, **tags}, {**figures, **more}, report)


def record(
    client: "MlflowClient",
    settings: Settings,
    run_name: str,
    tags: Mapping[str, str],
    figures: Mapping[str, float],
    report: Path | None = None,
) -> None:
    """Write one run of the experiment; it is FINISHED when all of it is there."""
    run_id = str(client.create_run(experiment_id(client, settings), tags=dict(tags), run_name=run_name).info.run_id)
    for key, value in figures.items():
        client.log_metric(run_id, key, value)
    if report:
        client.log_artifact(run_id, str(report))
    client.set_terminated(run_id)


def experiment_id(client: "MlflowClient", settings: Settings) -> str:
    """The experiment of where this runs, made where it is not there."""
    name = EXPERIMENT + settings.name_suffix
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, artifact_root(settings))
