"""The Flyte tasks of the registry. They are not cached, since the registry changes."""

from flytekit import task
from rich.console import Console

from forge.core.contracts import Dataset, Evaluation, Model, Version
from forge.core.logs import start_logging
from forge.core.recipe import Recipe
from forge.core.settings import load_settings
from forge.storage import open_store
from tasks.register import history as past
from tasks.register.pruning import prune, pruning_table
from tasks.register.register import register
from tasks.task_pods import light


@task(**light(cores=8, memory=32, hours=3, signs=True))
def register_model(recipe: Recipe, dataset: Dataset, model: Model, evaluation: Evaluation) -> Version:
    """Publish a trained model's package to the store, and create its version in MLflow."""
    start_logging("register")
    settings = load_settings()
    return register(recipe, dataset, model, evaluation, settings, open_store(settings))


@task(**light())
def show_history(name: str) -> list[str]:
    """Print the versions of a model, newest first, and return their numbers."""
    start_logging("registry")
    settings = load_settings()
    entries = past.history(name, settings, open_store(settings))
    Console().print(past.history_table(name, entries))
    return [entry.version for entry in entries]


@task(**light())
def show_lineage(name: str, version: str) -> str:
    """Print the lineage of a version (by default the champion), and return the URI of its package."""
    start_logging("registry")
    settings = load_settings()
    model_uri = f"models:/{name}/{version}" if version else f"models:/{name}@champion"
    facts = past.lineage(model_uri, settings, open_store(settings))
    Console().print(past.lineage_tree(facts))
    return str(facts["package"]["uri"])


@task(**light())
def prune_registry(name: str, keep: int, days: float, apply: bool) -> list[str]:
    """Print the packages that can be pruned, remove them with `apply`, and return their URIs."""
    start_logging("registry")
    settings = load_settings()
    removals = prune(name, keep, days, apply, settings, open_store(settings))
    Console().print(pruning_table(removals, apply))
    return [removal.package.uri for removal in removals]
