"""The doors of the summary."""

from flytekit import task
from rich.console import Console

from tasks.contracts import Dataset, Deployment, Evaluation, Model, Result, Version
from tasks.recipe import Recipe
from tasks.settings import load_settings
from tasks.summary.summary import facts_of, released, show, show_held_back, write_facts


@task
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
    return deployment.endpoint


@task
def hold_back(recipe: Recipe, started: float, dataset: Dataset, model: Model, evaluation: Evaluation) -> str:
    """Print why the gate held a model back, keep it in .forge/last-run.json, and return the reason."""
    stages: dict[str, Result] = {
        "preprocess_data": dataset, "train_model": model, "evaluate_model": evaluation
    }  # fmt: skip
    facts = {"name": recipe.name, **facts_of(dataset, evaluation, stages, started)}
    write_facts(facts, load_settings())
    show_held_back(facts, stages, started, Console())
    return evaluation.reason
