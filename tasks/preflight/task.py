"""The door of preflight."""

import time
from typing import Annotated, NamedTuple

from flytekit import HashMethod, task

from tasks.contracts import Base, Source, cache_key
from tasks.interrupts import keep_interrupts
from tasks.nodes import Shape
from tasks.pods import TRAINER_IMAGE, light
from tasks.recipe import Recipe


class Plan(NamedTuple):
    """What the run will do, with which rows, base model and shape of training; when it started (Unix time)."""

    recipe: Recipe
    source: Annotated[Source, HashMethod(cache_key)]
    base: Base
    shape: str
    started: float


# What it measures of a model, torch and transformers say: no GPU, but the image that trains.
@task(**light(cores=4, memory=16, signs=True, image=TRAINER_IMAGE))
def preflight(data_path: str, recipe: str) -> Plan:
    """Check all that the run needs; the recipe (a shipped one's name, or a path) and the source flow on from here."""
    from tasks.preflight.checks import check_all

    keep_interrupts()
    started = time.time()
    loaded, source, base = check_all(data_path, recipe)
    training = loaded.training
    return Plan(loaded, source, base, str(Shape(training.nodes, training.processes)), started)
