"""The doors of the summary."""

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
from tasks.summary.failure import describe_here, failure_message
from tasks.summary.summary import (
    Place,
    facts_of,
    registered,
    released,
    show,
    show_challenger,
    show_refused,
    write_facts,
)
from tasks.task_pods import light


@task(**light())
def summarise(
    started: float, dataset: Dataset, model: Model, evaluation: Evaluation, version: Version, deployment: Deployment
) -> str:
    """Print what the run came to, keep it in .forge/last-run.json, and return the endpoint."""
    stages = {**stages_of(dataset, model, evaluation), "register_model": version, "roll_out": deployment}
    close(facts_of(dataset, evaluation, stages, started) | released(deployment, version), stages, started, show)
    return deployment.endpoint


@task(**light())
def announce_challenger(
    started: float, dataset: Dataset, model: Model, evaluation: Evaluation, version: Version
) -> str:
    """Print what the run came to where models are only registered, and return the version."""
    stages = {**stages_of(dataset, model, evaluation), "register_model": version}
    close(facts_of(dataset, evaluation, stages, started) | registered(version), stages, started, show_challenger)
    return f"{version.name} version {version.version}"


@task(**light())
def hold_back(name: str, started: float, dataset: Dataset, model: Model, evaluation: Evaluation) -> str:
    """Print why the gate refused a model, keep it in .forge/last-run.json, and return the reason."""
    stages = stages_of(dataset, model, evaluation)
    close({"name": name, **facts_of(dataset, evaluation, stages, started)}, stages, started, show_refused)
    return evaluation.reason


def stages_of(dataset: Dataset, model: Model, evaluation: Evaluation) -> dict[str, Result]:
    """What the stages up to the gate came to, by the names of their tasks."""
    return {"preprocess_data": dataset, "train_model": model, "evaluate_model": evaluation}


def close(facts: dict[str, Any], stages: dict[str, Result], started: float, show: Callable[..., None]) -> None:
    """Print the summary; on this machine, keep its facts, too."""
    start_logging("summary")
    settings = load_settings()
    if not on_cluster():
        write_facts(facts, settings)
    show(facts, stages, started, Place(settings, on_cluster()), Console())
    end_soon()


@task(**light())
def tell_failure(data_path: str, recipe: str, err: FlyteError | None = None) -> None:
    """Say where the pipeline failed, and how to go on.

    Nothing hangs on it: Flyte does not run it again in an execution that was started by --recover.
    """
    start_logging("summary")
    inputs = {"data_path": data_path, "recipe": recipe}
    try:
        settings = load_settings()
    except ForgeError:  # preflight has said what is wrong with them
        return
    if not on_cluster():
        if said := describe_here(inputs, settings):
            print(said, flush=True)
        return
    stage, message = (err.failed_node_id, err.message) if err else ("", "")
    print(failure_message(stage, message, inputs, settings), flush=True)
