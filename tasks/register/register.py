"""Registration: publish the model's package, and record its run and version in MLflow. Can be repeated safely."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.core.contracts import Base, Dataset, Evaluation, Model, Version
from forge.core.digest import digest_directory, digest_json
from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import (
    CHALLENGER,
    EVALUATION,
    MODEL_DIGEST,
    PACKAGE_DIGEST,
    REGISTERED_BY,
    champion_version,
    open_registry,
    translate_mlflow_errors,
)
from forge.registry.mlflow_runs import MAX_TEXT, experiment_id, metrics_of
from forge.registry.packages import ADAPTER, is_registered, open_package, portable_name
from forge.storage import Store
from forge.storage.lease import current_owner, lease
from tasks.register.publish import build_package, ensure_signed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

DATASET_DIGEST, RECIPE_DIGEST, VERDICT = "dataset_digest", "recipe_digest", "verdict"  # tags of versions
MAX_DATASET_DIGEST = 36  # characters that MLflow accepts


@dataclass(frozen=True)
class Registration:
    """What is registered, and where. `facts` go into the package's manifest and card."""

    recipe: Recipe
    dataset: Dataset
    evaluation: Evaluation
    directory: Path  # of the trained model
    training: dict[str, Any]
    facts: dict[str, Any]
    client: "MlflowClient"
    settings: Settings
    store: Store

    @property
    def name(self) -> str:
        """The registered model's name."""
        return self.recipe.name

    @property
    def registered_base(self) -> Base | None:
        """The base of an adapter that was trained on a registered model, else None."""
        base = Base(**self.training["base"])
        return base if self.facts["kind"] == ADAPTER and is_registered(base.location) else None


def register(
    recipe: Recipe, dataset: Dataset, model: Model, evaluation: Evaluation, settings: Settings, store: Store
) -> Version:
    """Publish the package and create its version, or return the version that an earlier run created for the same model.

    A model trained with LoRA is packaged as an adapter. Raises ForgeError if the registered base of an adapter is
    missing.
    """
    started = time.time()
    directory = store.path(model.uri)
    training = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    client = open_registry(settings)
    facts = package_facts(recipe, dataset, evaluation, training, directory)
    registration = Registration(recipe, dataset, evaluation, directory, training, facts, client, settings, store)
    with contextlib.ExitStack() as stack:
        leases = [stack.enter_context(lease(store, f"registration-{name}")) for name in leased_names(registration)]
        stack.enter_context(translate_mlflow_errors(f"{recipe.name} could not be registered", settings))
        check_base(registration)
        version = find_version_of_model(client, recipe.name, facts["model_digest"], store)
        if version is not None:
            uri, digest = refresh_version(registration, version)
        else:
            version, uri, digest = create_version(registration, leases)
        make_challenger(registration, version)
    return Version(
        uri=uri,
        digest=digest,
        store=store.identity,
        started=started,
        seconds=time.time() - started,
        name=recipe.name,
        version=str(version.version),
        run_id=version.run_id or "",
    )


def package_facts(
    recipe: Recipe, dataset: Dataset, evaluation: Evaluation, training: dict[str, Any], directory: Path
) -> dict[str, Any]:
    """The facts for the manifest and the card. They are the same in every attempt, and so is the package."""
    adapted = recipe.training.method != "full"
    facts = {
        "kind": ADAPTER if adapted else "model",
        "name": recipe.name,
        "model_digest": digest_directory(directory / "model")[0],
        "base": training["base"],
        "dataset": dataset.digest,
        "recipe": digest_json(recipe.model_dump(mode="json")),
        "evaluation": evaluation.digest,
        "verdict": evaluation.reason,
        "metrics": metrics_of(evaluation),
        "versions": training["versions"],
        "made_by": training["made_by"],
    }
    return facts | (adapter_facts(directory) if adapted else {})


def adapter_facts(directory: Path) -> dict[str, Any]:
    """Further facts of an adapter: its rank, and the dtype of the model when merged into its base."""
    adapter = json.loads((directory / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    model = json.loads((directory / "model" / "config.json").read_text(encoding="utf-8"))
    return {"rank": adapter["r"], "dtype": model["dtype"]}


def leased_names(registration: Registration) -> list[str]:
    """The models to hold a lease of: this one, and an adapter's base, so that pruning can't remove it meanwhile."""
    base = registration.registered_base
    return sorted({registration.name} | ({base.location.split("/")[-2]} if base else set()))


def check_base(registration: Registration) -> None:
    """Raise ForgeError if the registered base of an adapter is missing."""
    base = registration.registered_base
    if base and not registration.store.exists(portable_name(base)):
        raise ForgeError(
            f"{registration.name} is an adapter of {base.location}, which is missing",
            where="register",
            fix="restore it, or train on another base",
        )


def find_version_of_model(client: "MlflowClient", name: str, model_digest: str, store: Store) -> "ModelVersion | None":
    """The version of a model with this digest, if its package exists."""
    for version in client.search_model_versions(f"name = '{name}' and tags.{MODEL_DIGEST} = '{model_digest}'"):
        if store.exists(f"models/{name}/{(version.source or '').rpartition('/')[2]}"):
            return version
    return None


def refresh_version(registration: Registration, version: "ModelVersion") -> tuple[str, str]:
    """Verify the package of an existing version, sign it if need be, and record the evaluation if it is a new one.

    Returns the package's URI and digest.
    """
    client, store, settings = registration.client, registration.store, registration.settings
    uri, digest = version.source or "", version.tags[PACKAGE_DIGEST]
    ensure_signed(uri, settings, store)
    open_package(uri, digest, settings, store)
    log.info(f"{registration.name} version {version.version} already is this model")
    if version.tags.get(EVALUATION) != registration.evaluation.digest:
        log_evaluation(client, version.run_id or "", registration.evaluation, store)
        client.set_model_version_tag(registration.name, version.version, EVALUATION, registration.evaluation.digest)
    return uri, digest


def create_version(registration: Registration, leases: Sequence[Callable[[], None]]) -> tuple["ModelVersion", str, str]:
    """Publish the package, record the run, and create the version; also returns the package's URI and digest.

    The functions in `leases` raise ForgeError if a lease has been lost meanwhile.
    """
    client, store, name, facts = registration.client, registration.store, registration.name, registration.facts
    store.sweep(f"models/{name}", timedelta(0))  # the lease is held, so no upload of this name is in progress
    files = registration.directory / (ADAPTER if facts["kind"] == ADAPTER else "model")
    uri, digest = build_package(files, facts, registration.settings, store)
    run_id = record_run(registration)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = {
        PACKAGE_DIGEST: digest,
        MODEL_DIGEST: facts["model_digest"],
        DATASET_DIGEST: registration.dataset.digest,
        RECIPE_DIGEST: facts["recipe"],
        EVALUATION: registration.evaluation.digest,
        VERDICT: facts["verdict"][:MAX_TEXT],
    }
    for check_lease in leases:
        check_lease()
    version = client.create_model_version(name, source=uri, run_id=run_id, tags=tags)
    log.info(f"{name} version {version.version} is {uri}")
    return version, uri, digest


def make_challenger(registration: Registration, version: "ModelVersion") -> None:
    """Give a version the alias challenger, unless it is the champion."""
    client, name = registration.client, registration.name
    if champion_version(client, name) != str(version.version):
        client.set_model_version_tag(name, version.version, REGISTERED_BY, current_owner())
        client.set_registered_model_alias(name, CHALLENGER, version.version)


def record_run(registration: Registration) -> str:
    """Record the run (parameters, loss curve, data set, scores, report); returns its ID.

    A run that an interrupted attempt left unfinished is deleted and recorded again.
    """
    client, name, evaluation = registration.client, registration.name, registration.evaluation
    digest = registration.facts["model_digest"]
    experiment = experiment_id(client, name, registration.settings)
    for run in client.search_runs([experiment], f"tags.{MODEL_DIGEST} = '{digest}'"):
        if run.info.status == "FINISHED":  # by an attempt that was interrupted before it created the version
            log_evaluation(client, run.info.run_id, evaluation, registration.store)
            return str(run.info.run_id)
        client.delete_run(run.info.run_id)
    tags = {MODEL_DIGEST: digest, "made_by": registration.facts["made_by"]}
    run_id = str(client.create_run(experiment, tags=tags, run_name=f"{name}-{digest[:12]}").info.run_id)
    log_training(registration, run_id)
    log_evaluation(client, run_id, evaluation, registration.store)
    client.set_terminated(run_id)
    return run_id


def log_training(registration: Registration, run_id: str) -> None:
    """Log the recipe, the loss curve, the throughput and the data set."""
    from mlflow.entities import Dataset as LoggedDataset
    from mlflow.entities import DatasetInput, Metric, Param

    training, dataset = registration.training, registration.dataset
    now = int(time.time() * 1000)
    metrics = [
        Metric(name, point[name], now, int(point["step"]))
        for point in training["curve"]
        for name in ("loss", "heldout_loss")
        if name in point
    ]
    metrics.append(Metric("tokens_per_second", training["tokens_per_second"], now, 0))
    parameters = [Param(*item) for item in flatten(registration.recipe.model_dump(mode="json"))]
    registration.client.log_batch(run_id, metrics, parameters)
    source = json.dumps({"uri": dataset.uri})
    logged = LoggedDataset(registration.name, dataset.digest[:MAX_DATASET_DIGEST], "local", source)
    registration.client.log_inputs(run_id, [DatasetInput(logged)])


def log_evaluation(client: "MlflowClient", run_id: str, evaluation: Evaluation, store: Store) -> None:
    """Log scores and report to a run, replacing those of an earlier evaluation."""
    for name, value in metrics_of(evaluation).items():
        client.log_metric(run_id, name, value)
    client.log_artifact(run_id, str(store.path(evaluation.report)))


def flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as dotted names and strings, in order."""
    flat: list[tuple[str, str]] = []
    for name, part in value.items():
        flat += flatten(part, f"{prefix}{name}.") if isinstance(part, dict) else [(f"{prefix}{name}", str(part))]
    return flat
