"""The door of registration. Not cached by Flyte: it finds for itself what an earlier run has done."""

from flytekit import task

from tasks.contracts import Dataset, Evaluation, Model, Version
from tasks.recipe import Recipe
from tasks.register.register import register
from tasks.settings import load_settings
from tasks.storage import open_store


@task
def register_model(recipe: Recipe, dataset: Dataset, model: Model, evaluation: Evaluation) -> Version:
    """A trained model to a package in the store and a version in MLflow."""
    settings = load_settings()
    return register(recipe, dataset, model, evaluation, settings, open_store(settings))
