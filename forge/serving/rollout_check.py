"""The state that a rollout will bring about, and whether what serves has a place for it.

A rollout asks at its beginning, and preflight before anything is trained, by the same code.
"""

from collections.abc import Callable
from typing import Any

from forge.capacity.model_size import measure_model
from forge.capacity.serving_memory import check_adapters, check_serving, gpus_for, read_shape, serving_gpus
from forge.core.contracts import Base
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import Recipe, ServingRecipe
from forge.core.settings import Settings
from forge.registry.packages import ADAPTER
from forge.serving.desired import Served, Serving
from forge.serving.engine import engine_of
from forge.serving.plan import loading_state, plan

UNKNOWN = "0" * 64  # the digest of what has yet to be trained
Describe = Callable[[Served], tuple[dict[str, Any], int]]  # the config.json of a base, and the bytes of its weights


def state_after_rollout(
    now: Serving,
    served: Served,
    manifest: dict[str, Any],
    recipe: ServingRecipe,
    settings: Settings,
    describe: Describe,
) -> tuple[Serving, str]:
    """The state after a rollout, its base on all the GPUs that can divide it, and how it uses them ("" as before).

    Beside a base that goes on serving, adapters must fit the slots that it was started with. ForgeError where public
    names would be taken away, or it does not fit.
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
            f"base model {base.directory}: the cluster's vLLM has no such directory; train on a model of the hub, or "
            "on a registered one: models:/name/version"
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
    """Whether what a recipe trains could be rolled out where `serving` serves now.

    `config` is the config.json of what is trained. ForgeError, or Problems, with what the rollout would refuse.
    """
    training = recipe.training
    if training.lora:  # on its base as that is
        manifest = {"kind": ADAPTER, "base": base.model_dump(), "rank": training.lora.rank}
    else:  # saved in the precision that it is trained in
        manifest = {"kind": "model"}
        config = {**config, "torch_dtype": None, "dtype": "float32" if training.precision == "fp32" else "bfloat16"}

    def estimate(_: Served) -> tuple[dict[str, Any], int]:
        return config, measure_model(config).parameters * read_shape(config, recipe.name).element

    served = Served(name=recipe.name, version="", uri="", digest=UNKNOWN)
    refused = f"the rollout of {recipe.name} would be refused: "
    try:
        state_after_rollout(serving, served, manifest, recipe.serving, settings, estimate)
    except Problems as error:
        raise Problems(refused, error.problems) from None
    except ForgeError as error:
        raise ForgeError(refused + error.message) from None
