"""Rollback by an operator: an earlier version serves again, and becomes the champion again."""

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

ROLLED_BACK = (
    "rolled_back"  # the tag of a version that was rolled back by hand; its value says for which version, and by whom
)


def roll_back(name: str, to: str, recipe: ServingRecipe | None, settings: Settings, store: Store) -> Deployment:
    """Serve version `to` again, by default the previous champion, with the same proof as any rollout.

    Without `recipe`, the serving options are those of the version's own recipe. ForgeError if there is no such version,
    or its rollout fails, which leaves everything as it was.
    """
    client = open_registry(settings)
    with translate_mlflow_errors(f"the champion of {name} cannot be read", settings):
        champion = find_champion(client, name)
    if champion is None:
        raise ForgeError(f"{name} has no champion yet", where="rollback", fix="run training_pipeline first")
    to = to or champion_before(name, champion.version, settings, store)
    version = find_registered_version(f"models:/{name}/{to}", settings)
    uri, digest = resolve(f"models:/{name}/{to}", settings)
    package, manifest = open_package(uri, digest, settings, store)
    evaluated = version.tags.get(EVALUATION, "")
    place = f"evaluations/sha256-{evaluated}"
    evaluation = store.path(store.uri(place)) if store.exists(place) else None
    if evaluation is None:
        log.warning(f"{name} version {to}: its evaluation is missing, so it only has to answer")
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
    """The last champion before this one that was neither rolled back nor failed; ForgeError if there is none."""
    for past in reversed(promotions(store, name)):
        if past.version not in ("", version):
            tags = find_registered_version(f"models:/{name}/{past.version}", settings).tags
            if ROLLED_BACK not in tags and FAILED not in tags:
                return past.version
    raise ForgeError(
        f"no other version of {name} was the champion before {version}", where="rollback", fix="choose one: --to N"
    )


def recipe_of(version: "ModelVersion", settings: Settings) -> ServingRecipe:
    """The serving section of a version's recipe, from its run in MLflow; the defaults if it has no run."""
    if not version.run_id:
        return ServingRecipe()
    with translate_mlflow_errors(f"the run of version {version.version} cannot be read", settings):
        params = open_registry(settings).get_run(version.run_id).data.params
    serving = {key.removeprefix("serving."): value for key, value in params.items() if key.startswith("serving.")}
    values = {key: yaml.safe_load(value) for key, value in serving.items() if value != "None"}  # MLflow stores strings
    return ServingRecipe.model_validate({key: values[key] for key in values.keys() & ServingRecipe.model_fields.keys()})
