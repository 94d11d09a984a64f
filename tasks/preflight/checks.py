"""All checks of preflight, in order. A check raises ForgeError with the problem and its fix."""

from collections.abc import Callable
from typing import Any, TypeVar

from forge.core.contracts import Base, Source
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import DataRecipe, Recipe
from forge.core.settings import Settings, load_settings
from forge.models.chat_format import ChatFormat
from forge.registry.mlflow_registry import open_registry
from forge.registry.signature import check_keys
from forge.storage import Store
from forge.storage.recipes import load_recipe
from tasks.evaluate.harness import check_harness
from tasks.preflight.data_checks import absolute_uri, check_data
from tasks.preflight.model_checks import (
    check_memory,
    check_room_to_serve,
    check_trainable_base,
    check_training,
    find_base,
    open_base,
    trained_config,
)
from tasks.preflight.service_checks import (
    check_champion,
    check_cluster_settings,
    check_copies,
    check_engine,
    check_port,
    check_vllm,
    writable_store,
)

T = TypeVar("T")


class Checks:
    """Runs checks and collects the problems that they find."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def run(self, check: Callable[..., T], *inputs: Any) -> T | None:
        """The result of a check, None if it fails. It is skipped if an input is None: a check before it has failed."""
        if any(value is None for value in inputs):
            return None
        try:
            return check(*inputs)
        except Problems as error:
            self.problems.extend(error.problems)
        except ForgeError as error:
            self.problems.append(error.message)
        return None


def check_all(data_path: str, recipe: str) -> tuple[Recipe, Source, Base]:
    """Run all checks; returns the recipe, the source and the base model. Raises Problems if any check fails.

    On a cluster, what other pods will use (vLLM, the serving port, GPUs) is checked by the settings and services, not
    on this machine.
    """
    checks = Checks()
    settings = checks.run(load_settings)
    loaded = checks.run(load_recipe, recipe)
    loaded = checks.run(apply_settings, loaded, settings) or loaded
    store = checks.run(writable_store, settings)
    base, form = check_model(checks, loaded, settings, store) if loaded else (None, None)
    data = checks.run(lambda: check_data(given_data(loaded, data_path), form))
    if settings is not None:
        check_services(checks, loaded, settings, store)
    if checks.problems or loaded is None or store is None or data is None or base is None:
        raise Problems("Nothing was started, because:", checks.problems)
    return pinned(loaded, *data, base, store)


def apply_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with the settings applied: the model's name gets the suffix, and rollouts may be switched off."""
    rollout = settings.rollout and recipe.serving.rollout is not False
    serving = recipe.serving.model_copy(update={"rollout": rollout})
    return recipe.model_copy(update={"name": f"{recipe.name}{settings.name_suffix}", "serving": serving})


def given_data(recipe: Recipe | None, data_path: str) -> DataRecipe:
    """The data to check, with absolute URIs. If the recipe is invalid, the rows are checked by the defaults."""
    data = recipe.data if recipe else DataRecipe(max_seq_len=16)
    sources = {
        "source": absolute_uri(data_path or data.source),
        "heldout_source": absolute_uri(data.heldout_source),
    }
    return data.model_copy(update=sources)


def check_model(
    checks: Checks, recipe: Recipe, settings: Settings | None, store: Store | None
) -> tuple[Base | None, ChatFormat | None]:
    """Check the GPUs, the base model, and that the model fits in training and serving.

    Returns the base model and, if its files are here, its chat format.
    """
    gpus = checks.run(lambda: check_training(recipe.training, settings))
    base = checks.run(lambda: find_base(recipe.model, settings, store))
    local = checks.run(open_base, base, settings, store)
    config = checks.run(trained_config, recipe, local)
    form = checks.run(check_trainable_base, recipe, local, config)
    checks.run(check_memory, recipe, config, gpus)
    if recipe.serving.rollout:
        checks.run(check_room_to_serve, recipe, base, config, settings)
    return base, form


def check_services(checks: Checks, recipe: Recipe | None, settings: Settings, store: Store | None) -> None:
    """Check the registry, the settings, and the programs that evaluation and serving need."""
    rollout = settings.rollout if recipe is None else bool(recipe.serving.rollout)
    serves_here = rollout and settings.serving_target == "local"
    if store is not None or settings.mlflow_uri:  # the embedded registry is on the same disk as a local store
        client = checks.run(open_registry, settings)
        checks.run(check_champion, client, store, recipe and recipe.name)
    checks.run(check_cluster_settings, settings, rollout)
    checks.run(check_copies, settings)
    checks.run(check_keys, settings)
    if recipe is not None and recipe.evaluation.harness_tasks:
        checks.run(check_harness, recipe.evaluation.harness_tasks, settings)
    if recipe is not None:
        checks.run(check_engine, recipe.evaluation, settings)
    if serves_here and not (recipe and recipe.evaluation.engine == "vllm"):
        checks.run(check_vllm, settings)
    if serves_here:
        checks.run(check_port, settings)


def pinned(recipe: Recipe, data: DataRecipe, digest: str, base: Base, store: Store) -> tuple[Recipe, Source, Base]:
    """The results of preflight. The recipe refers to the rows by their digest, so a copy of them elsewhere is no new
    data set.
    """
    names = {"source": f"sha256-{digest}", "heldout_source": "given" * bool(data.heldout_source)}
    model = recipe.model.model_copy(update={"base": base.location or None})
    source = Source(uri=data.source, heldout=data.heldout_source, digest=digest, store=store.identity)
    return recipe.model_copy(update={"data": data.model_copy(update=names), "model": model}), source, base
