"""The Flyte tasks of the summary."""

from collections.abc import Callable
from typing import Any

from flytekit import task
from flytekit.types.error.error import FlyteError
from rich.console import Console

from forge.cluster.gpus import on_cluster
from forge.core.contracts import Dataset, Deployment, Evaluation, Model, Result, Version
from forge.core.errors import ForgeError
from forge.core.logs import start_logging
from forge.core.processes import end_soon
from forge.core.settings import load_settings
from tasks.summary.failure import failure_message, resume_hint
from tasks.summary.summary import (
    Place,
    deployment_facts,
    facts_of,
    show,
    show_challenger,
    show_rejected,
    version_facts,
    write_facts,
)
from tasks.task_pods import light


@task(**light())
def summarise(
    started: float, dataset: Dataset, model: Model, evaluation: Evaluation, version: Version, deployment: Deployment
) -> str:
    """Print the summary of a run whose model serves, and return the endpoint."""
    stages = {**stages_of(dataset, model, evaluation), "register_model": version, "roll_out": deployment}
    close(facts_of(dataset, evaluation, stages, started) | deployment_facts(deployment, version), stages, started, show)
    return deployment.endpoint


@task(**light())
def announce_challenger(
    started: float, dataset: Dataset, model: Model, evaluation: Evaluation, version: Version
) -> str:
    """Print the summary of a run whose model was only registered, and return the version."""
    stages = {**stages_of(dataset, model, evaluation), "register_model": version}
    close(facts_of(dataset, evaluation, stages, started) | version_facts(version), stages, started, show_challenger)
    return f"{version.name} version {version.version}"


@task(**light())
def announce_rejection(name: str, started: float, dataset: Dataset, model: Model, evaluation: Evaluation) -> str:
    """Print why the gate rejected a model, and return the reason."""
    stages = stages_of(dataset, model, evaluation)
    close({"name": name, **facts_of(dataset, evaluation, stages, started)}, stages, started, show_rejected)
    return evaluation.reason


def stages_of(dataset: Dataset, model: Model, evaluation: Evaluation) -> dict[str, Result]:
    """The results of the stages up to the gate, by task name."""
    return {"preprocess_data": dataset, "train_model": model, "evaluate_model": evaluation}


def close(facts: dict[str, Any], stages: dict[str, Result], started: float, show: Callable[..., None]) -> None:
    """Print the summary. On this machine, also write its facts to .forge/last-run.json."""
    start_logging("summary")
    settings = load_settings()
    if not on_cluster():
        write_facts(facts, settings)
    show(facts, stages, started, Place(settings, on_cluster()), Console())
    end_soon()


@task(**light())
def report_failure(data_path: str, recipe: str, err: FlyteError | None = None) -> None:
    """Print where the pipeline failed, and how to resume it.

    Nothing may depend on this task: Flyte does not run it again in an execution started with --recover.
    """
    start_logging("summary")
    inputs = {"data_path": data_path, "recipe": recipe}
    try:
        settings = load_settings()
    except ForgeError:  # preflight has reported the invalid settings
        return
    if not on_cluster():
        if hint := resume_hint(inputs, settings):
            print(hint, flush=True)
        return
    stage, message = (err.failed_node_id, err.message) if err else ("", "")
    print(failure_message(stage, message, inputs, settings), flush=True)
