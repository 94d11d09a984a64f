"""The doors of the summary."""

from flytekit import task
from flytekit.types.error.error import FlyteError
from rich.console import Console

from tasks.cluster import on_cluster
from tasks.contracts import Dataset, Deployment, Evaluation, Model, Result, Version
from tasks.errors import ForgeError
from tasks.pods import light
from tasks.processes import end_soon
from tasks.recipe import Recipe
from tasks.settings import load_settings
from tasks.summary.failure import describe, describe_here, give_back
from tasks.summary.summary import facts_of, released, show, show_held_back, write_facts


@task(**light())
def summarise(
    started: float, dataset: Dataset, model: Model, evaluation: Evaluation, version: Version, deployment: Deployment
) -> str:
    """Print what the run came to, keep it in .forge/last-run.json, and return the endpoint."""
    stages: dict[str, Result] = {
        "preprocess_data": dataset,
        "train_model": model,
        "evaluate_model": evaluation,
        "register_model": version,
        "roll_out": deployment,
    }
    facts = facts_of(dataset, evaluation, stages, started) | released(deployment)
    write_facts(facts, load_settings())
    show(facts, stages, started, Console())
    end_soon()
    return deployment.endpoint


@task(**light())
def hold_back(recipe: Recipe, started: float, dataset: Dataset, model: Model, evaluation: Evaluation) -> str:
    """Print why the gate held a model back, keep it in .forge/last-run.json, and return the reason."""
    stages: dict[str, Result] = {
        "preprocess_data": dataset, "train_model": model, "evaluate_model": evaluation
    }  # fmt: skip
    facts = {"name": recipe.name, **facts_of(dataset, evaluation, stages, started)}
    write_facts(facts, load_settings())
    show_held_back(facts, stages, started, Console())
    end_soon()
    return evaluation.reason


@task(**light())
def tell_failure(data_path: str, recipe: str, err: FlyteError | None = None) -> None:
    """Say where the pipeline failed, and how to go on; on the cluster, give back what the execution holds."""
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
    print(describe(stage, message, inputs, settings), flush=True)
    for done in give_back(recipe, settings):
        print(f"given back: {done}", flush=True)
