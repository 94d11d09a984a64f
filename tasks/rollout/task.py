"""The Flyte tasks of the rollout. They are not cached, since what serves can change at any time."""

from flytekit import task
from rich.console import Console

from forge.core.contracts import Deployment, Evaluation, Version
from forge.core.logs import start_logging
from forge.core.recipe import ServingRecipe
from forge.core.settings import load_settings
from forge.storage import open_store
from tasks.task_pods import light


@task(**light(cores=8, memory=32, hours=3, rolls_out=True))
def roll_out(version: Version, evaluation: Evaluation, serving: ServingRecipe) -> Deployment:
    """Serve a version, prove it over its API, and make it the champion."""
    from tasks.rollout import rollout
    from tasks.rollout.rollout_report import table

    start_logging("roll_out")
    settings = load_settings()
    deployment = rollout.roll_out(version, evaluation, serving, settings, open_store(settings))
    Console().print(table(deployment))
    return deployment


@task(**light(cores=8, memory=32, hours=3, rolls_out=True))
def roll_back(name: str, to: str) -> Deployment:
    """Serve an earlier version again, and make it the champion again."""
    from tasks.rollout import rollback
    from tasks.rollout.rollout_report import table

    start_logging("rollback")
    settings = load_settings()
    deployment = rollback.roll_back(name, to, None, settings, open_store(settings))
    Console().print(table(deployment))
    return deployment
