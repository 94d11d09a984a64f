"""The Flyte task of preflight."""

import time
from typing import Annotated, NamedTuple

from flytekit import HashMethod, task

from forge.cluster.gpus import on_cluster
from forge.cluster.nodes import SHAPES, TrainingShape
from forge.core.contracts import Base, Source, cache_key, value_key
from forge.core.logs import start_logging
from forge.core.recipe import DataRecipe, EvaluationRecipe, GateRecipe, ModelRecipe, Recipe, TrainingRecipe
from forge.core.signals import keep_interrupts
from tasks.task_pods import TRAINER_IMAGE, light


class Plan(NamedTuple):
    """What the run does: the checked recipe, its rows, base model and training shape; when it started (Unix time).

    The recipe's sections are outputs of their own, because cached tasks must take whole outputs. Flyte serializes an
    attribute of an output again in each execution, with its keys in another order, so the cache would never hit.
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


# In the trainer image, since it measures models with torch and transformers; it needs no GPU.
@task(**light(cores=4, memory=16, signs=True, image=TRAINER_IMAGE))
def preflight(data_path: str, recipe: str) -> Plan:
    """Check everything the run needs. `recipe` is a name, path, URI or YAML: see load_recipe."""
    from tasks.preflight.checks import check_all

    start_logging("preflight")
    keep_interrupts()
    started = time.time()
    loaded, source, base = check_all(data_path, recipe)
    training = loaded.training
    # On one machine, a training starts its own processes, for all nodes, so any of the tasks can run it.
    shape = TrainingShape(training.nodes, training.nproc_per_node) if on_cluster() else SHAPES[0]
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
        shape=str(shape),
        rollout=bool(loaded.serving.rollout),
        started=started,
    )
