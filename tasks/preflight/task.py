"""The door of preflight."""

import time
from typing import Annotated, NamedTuple

from flytekit import HashMethod, task

from forge.cluster.nodes import TrainingShape
from forge.core.contracts import Base, Source, cache_key, value_key
from forge.core.logs import start_logging
from forge.core.recipe import DataRecipe, EvaluationRecipe, GateRecipe, ModelRecipe, Recipe, TrainingRecipe
from forge.core.signals import keep_interrupts
from tasks.task_pods import TRAINER_IMAGE, light


class Plan(NamedTuple):
    """What the run will do, with which rows, base model and shape of training; when it started (Unix time).

    The recipe's sections are outputs of their own, since cached tasks take whole outputs: Flyte encodes an attribute of
    an output anew in every execution, in another order, and would never find it in its cache.
    """

    recipe: Recipe
    name: str
    source: Annotated[Source, HashMethod(cache_key)]
    base: Annotated[Base, HashMethod(value_key)]
    data: Annotated[DataRecipe, HashMethod(value_key)]
    model: Annotated[ModelRecipe, HashMethod(value_key)]
    training: Annotated[TrainingRecipe, HashMethod(value_key)]
    evaluation: Annotated[EvaluationRecipe, HashMethod(value_key)]
    gate: Annotated[GateRecipe, HashMethod(value_key)]
    shape: str
    rollout: bool
    started: float


# What it measures of a model, torch and transformers say: no GPU, but the image that trains.
@task(**light(cores=4, memory=16, signs=True, image=TRAINER_IMAGE))
def preflight(data_path: str, recipe: str) -> Plan:
    """Check all that the run needs; the recipe, as load_recipe takes it, and the source flow on from here."""
    from tasks.preflight.checks import check_all

    start_logging("preflight")
    keep_interrupts()
    started = time.time()
    loaded, source, base = check_all(data_path, recipe)
    training = loaded.training
    return Plan(
        recipe=loaded,
        name=loaded.name,
        source=source,
        base=base,
        data=loaded.data,
        model=loaded.model,
        training=training,
        evaluation=loaded.evaluation,
        gate=loaded.gate,
        shape=str(TrainingShape(training.nodes, training.nproc_per_node)),
        rollout=bool(loaded.serving.rollout),
        started=started,
    )
