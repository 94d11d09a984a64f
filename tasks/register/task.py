"""The doors of the registry. Not cached by Flyte: each looks for itself at what is there."""

from flytekit import task
from rich.console import Console

from forge.core.contracts import Dataset, Evaluation, Model, Version
from forge.core.logs import start_logging
from forge.core.recipe import Recipe
from forge.core.settings import load_settings
from forge.storage import open_store
from tasks.register import history as past
from tasks.register.register import register
from tasks.register.retention import retain, retention_table
from tasks.task_pods import light


@task(**light(cores=8, memory=32, hours=3, signs=True))
def register_model(recipe: Recipe, dataset: Dataset, model: Model, evaluation: Evaluation) -> Version:
    """A trained model to a package in the store and a version in MLflow."""
    start_logging("register")
    settings = load_settings()
    return register(recipe, dataset, model, evaluation, settings, open_store(settings))


@task(**light())
def show_history(name: str) -> list[str]:
    """Print the versions of a name, the newest first, and return their numbers."""
    start_logging("registry")
    settings = load_settings()
    entries = past.history(name, settings, open_store(settings))
    Console().print(past.history_table(name, entries))
    return [entry.version for entry in entries]


@task(**light())
def show_lineage(name: str, version: str) -> str:
    """Print what a version was made from, the champion without one, and return the URI of its package."""
    start_logging("registry")
    settings = load_settings()
    model_uri = f"models:/{name}/{version}" if version else f"models:/{name}@champion"
    facts = past.lineage(model_uri, settings, open_store(settings))
    Console().print(past.lineage_tree(facts))
    return str(facts["package"]["uri"])


@task(**light())
def apply_retention(name: str, keep: int, days: float, apply: bool) -> list[str]:
    """Print what goes, or would go, and return the URIs of those packages."""
    start_logging("registry")
    settings = load_settings()
    removals = retain(name, keep, days, apply, settings, open_store(settings))
    Console().print(retention_table(removals, apply))
    return [removal.package.uri for removal in removals]
