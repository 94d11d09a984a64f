"""The door of the rollout. Not cached: what serves is looked at anew each time."""

from flytekit import task

from tasks.contracts import Deployment, Evaluation, Version
from tasks.recipe import ServingRecipe
from tasks.rollout import rollout
from tasks.settings import load_settings
from tasks.storage import open_store


@task
def roll_out(version: Version, evaluation: Evaluation, serving: ServingRecipe) -> Deployment:
    """Serve a version, prove it over its API, and make it the champion."""
    settings = load_settings()
    return rollout.roll_out(version, evaluation, serving, settings, open_store(settings))
