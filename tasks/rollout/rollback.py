"""The way back by hand: an earlier version serves again, and is the champion again."""

import logging
from typing import TYPE_CHECKING

import yaml

from forge.core.contracts import Deployment
from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import EVALUATION, find_champion, open_registry, translate_mlflow_errors
from forge.registry.packages import find_registered_version, open_package, resolve
from forge.registry.promotion import promotions
from forge.serving.desired import Served
from forge.serving.trial import FAILED
from forge.storage import Store
from forge.storage.lease import current_owner
from tasks.rollout.rollout import Candidate, serve

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

ROLLED_BACK = "rolled_back"  # the tag of a version that was taken back by hand: for which one, by whom


def roll_back(name: str, to: str, recipe: ServingRecipe | None, settings: Settings, store: Store) -> Deployment:
    """Serve version `to` again, or without one the champion before the present one; proved as any rollout is.

    It is served as its own recipe said, unless another is given. ForgeError where there is no such version, or it does
    not serve as it was evaluated; then nothing is changed.
    """
    client = open_registry(settings)
    with translate_mlflow_errors(f"the champion of {name} cannot be read", settings):
        champion = find_champion(client, name)
    if champion is None:
        raise ForgeError(f"rollback: {name} has no champion yet; run training_pipeline first")
    to = to or champion_before(name, champion.version, settings, store)
    version = find_registered_version(f"models:/{name}/{to}", settings)
    uri, digest = resolve(f"models:/{name}/{to}", settings)
    package, manifest = open_package(uri, digest, settings, store)
    evaluated = version.tags.get(EVALUATION, "")
    place = f"evaluations/sha256-{evaluated}"
    evaluation = store.path(store.uri(place)) if store.exists(place) else None
    if evaluation is None:
        log.warning(f"the evaluation of {name} version {to} is gone; it need only answer")
    served = Served(name=name, version=to, uri=uri, digest=digest)
    candidate = Candidate(
        served,
        package,
        manifest,
        evaluation,
        champion.version,
        f"rolled back by hand from version {champion.version}",
    )
    deployment = serve(candidate, recipe or recipe_of(version, settings), settings, store)
    if champion.version != to:
        why = f"for version {to}, by {current_owner()}"
        with translate_mlflow_errors(f"{name} version {champion.version} could not be tagged", settings):
            client.set_model_version_tag(name, champion.version, ROLLED_BACK, why)
    with translate_mlflow_errors(f"{name} version {to} could not be tagged", settings):
        if ROLLED_BACK in version.tags:
            client.delete_model_version_tag(name, to, ROLLED_BACK)
    return deployment


def champion_before(name: str, version: str, settings: Settings, store: Store) -> str:
    """The last champion but the present one that was neither rolled back nor failed; ForgeError where there is none."""
    for past in reversed(promotions(store, name)):
        if past.version not in ("", version):
            tags = find_registered_version(f"models:/{name}/{past.version}", settings).tags
            if ROLLED_BACK not in tags and FAILED not in tags:
                return past.version
    raise ForgeError(f"rollback: no other version of {name} was the champion before {version}; name one: --to N")


def recipe_of(version: "ModelVersion", settings: Settings) -> ServingRecipe:
    """The serving section of the recipe that a version was made with, as its run in MLflow has it."""
    if not version.run_id:
        return ServingRecipe()
    with translate_mlflow_errors(f"the run of version {version.version} cannot be read", settings):
        params = open_registry(settings).get_run(version.run_id).data.params
    known = {key.removeprefix("serving."): value for key, value in params.items() if key.startswith("serving.")}
    given = {key: yaml.safe_load(value) for key, value in known.items() if value != "None"}  # MLflow keeps texts
    return ServingRecipe.model_validate({key: given[key] for key in given.keys() & ServingRecipe.model_fields.keys()})
