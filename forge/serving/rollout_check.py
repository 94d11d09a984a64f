"""Checks whether a version can be rolled out next to what serves now: public names, adapter slots and GPU memory.

Rollouts and preflight run the same checks, so a rollout that would be refused is refused before training.
"""

from collections.abc import Callable
from typing import Any

from forge.capacity.decoder_shape import read_shape
from forge.capacity.model_size import measure_model
from forge.capacity.serving_memory import check_adapters, check_serving, gpus_for, serving_gpus
from forge.core.contracts import Base
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import Recipe, ServingRecipe
from forge.core.settings import Settings
from forge.registry.packages import ADAPTER
from forge.serving.desired import Served, Serving
from forge.serving.engine import engine_of
from forge.serving.plan import loading_state, plan

UNKNOWN = "0" * 64  # in place of the digest of a model that is still to be trained
# Returns the config.json of a base, and the size of its weights in bytes.
Describe = Callable[[Served], tuple[dict[str, Any], int]]


def state_after_rollout(
    now: Serving,
    served: Served,
    manifest: dict[str, Any],
    recipe: ServingRecipe,
    settings: Settings,
    describe: Describe,
) -> tuple[Serving, str]:
    """The state of the server after a rollout, and a line about GPU memory ("" if vLLM is not restarted).

    A new base uses as many GPUs as tensor parallelism can. If the base stays, the adapters must fit the slots that it
    was started with. ForgeError if public names would be lost, or something doesn't fit.
    """
    after = plan(now, served, manifest, engine_of(recipe), recipe.replaces)
    base, adapters, rank = after.base, len(loading_state(now, after).adapters), manifest.get("rank")
    if base is None or after == now:
        return after, ""
    if (base, after.engine) == (now.base, now.engine):
        check_adapters(after.engine, adapters, rank, base.versioned)
        return after, ""
    if settings.serving_target == "kubernetes" and base.directory:
        raise ForgeError(
            "the cluster's vLLM cannot read a directory of this machine",
            where=f"base model {base.directory}",
            fix="train on a model of the hub, or on a registered one: models:/name/version",
        )
    gpus = serving_gpus(settings)
    config, weight_bytes = describe(base)
    count = gpus_for(config, gpus, base.versioned)
    after = after.model_copy(update={"engine": after.engine.model_copy(update={"tensor_parallel": count})})
    fit = check_serving(
        config,
        weight_bytes,
        after.engine,
        gpus,
        base.versioned,
        context=after.engine.max_model_len,
        concurrency=recipe.concurrency,
        adapters=adapters,
        adapter_rank=rank,
    )
    return after, str(fit)


def check_rollout(recipe: Recipe, base: Base, config: dict[str, Any], serving: Serving, settings: Settings) -> None:
    """Check whether the model that a recipe trains could be rolled out next to what serves now.

    `config` is the config.json of its base. Raises ForgeError or Problems with the reasons for which the rollout would
    be refused.
    """
    training = recipe.training
    if training.lora:
        manifest = {"kind": ADAPTER, "base": base.model_dump(), "rank": training.lora.rank}
    else:  # it is saved in the precision of the training
        manifest = {"kind": "model"}
        config = {**config, "torch_dtype": None, "dtype": "float32" if training.precision == "fp32" else "bfloat16"}

    def estimate(_: Served) -> tuple[dict[str, Any], int]:
        return config, measure_model(config).parameters * read_shape(config, recipe.name).element

    served = Served(name=recipe.name, version="", uri="", digest=UNKNOWN)
    refused = f"the rollout of {recipe.name} would be refused"
    try:
        state_after_rollout(serving, served, manifest, recipe.serving, settings, estimate)
    except Problems as error:
        raise Problems(f"{refused}:", error.problems) from None
    except ForgeError as error:
        raise ForgeError(f"{refused}: {error.message}") from None
