"""The stage's work: package the model, and record its run and version in MLflow. Safe to run again."""

import contextlib
import json
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

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
    artifact_root,
    champion_version,
    open_registry,
    translate_mlflow_errors,
)
from forge.registry.packages import ADAPTER, is_registered, open_package, portable_name
from forge.storage import Store
from forge.storage.lease import current_owner, lease
from tasks.register.publish import build_package, ensure_signed

log = logging.getLogger(__name__)


def register(
    recipe: Recipe, dataset: Dataset, model: Model, evaluation: Evaluation, settings: Settings, store: Store
) -> Version:
    """Publish the package and create its version, or find the one that an earlier run made of the same model.

    What LoRA trained is packaged as the adapter alone. ForgeError where the registered model that it stands on is gone.
    """
    started = time.time()
    directory = store.path(model.uri)
    training = json.loads((directory / "training.json").read_text())
    client = open_registry(settings)
    model_digest, _ = digest_directory(directory / "model")
    adapted = recipe.training.method != "full"
    facts = {
        "kind": ADAPTER if adapted else "model",
        "name": recipe.name,
        "model_digest": model_digest,
        "base": training["base"],
        "dataset": dataset.digest,
        "recipe": digest_json(recipe.model_dump(mode="json")),
        "evaluation": evaluation.digest,
        "verdict": f"{evaluation.verdict}: {evaluation.reason}",
        "metrics": metrics_of(evaluation),
        "versions": training["versions"],
        "made_by": training["made_by"],
    }
    names = {recipe.name}
    if adapted:
        facts |= adapter_facts(directory)
        base = Base(**training["base"])
        if is_registered(base.location):
            names.add(base.location.split("/")[-2])  # whose retention waits until it can see that the base is needed
    with contextlib.ExitStack() as held:
        checks = [held.enter_context(lease(store, f"registration-{name}")) for name in sorted(names)]
        held.enter_context(translate_mlflow_errors(f"{recipe.name} could not be registered", settings))
        if adapted and is_registered(base.location) and not store.exists(portable_name(base)):
            raise ForgeError(
                f"register: {recipe.name} is an adapter of {base.location}, which is gone; put it back, or train on "
                "another base"
            )
        found = find_version_of_model(client, recipe.name, model_digest, store)
        if found is not None:
            uri, digest = found.source, found.tags[PACKAGE_DIGEST]
            ensure_signed(uri, settings, store)
            open_package(uri, digest, settings, store)
            log.info(f"{recipe.name} version {found.version} is this model already")
            if found.tags.get(EVALUATION) != evaluation.digest:
                log_evaluation(client, found.run_id, evaluation, store)
                client.set_model_version_tag(recipe.name, found.version, EVALUATION, evaluation.digest)
        else:
            store.sweep(f"models/{recipe.name}", timedelta(0))  # nobody else sends a package of this name now
            uri, digest = build_package(directory / (ADAPTER if adapted else "model"), facts, settings, store)
            run_id = record_run(client, recipe, dataset, evaluation, training, facts, settings, store)
            if not client.search_registered_models(f"name = '{recipe.name}'"):
                client.create_registered_model(recipe.name)
            tags = {
                PACKAGE_DIGEST: digest,
                MODEL_DIGEST: model_digest,
                "dataset_digest": dataset.digest,
                "recipe_digest": facts["recipe"],
                EVALUATION: evaluation.digest,
                "verdict": facts["verdict"][:4000],
            }
            for check in checks:
                check()
            found = client.create_model_version(recipe.name, source=uri, run_id=run_id, tags=tags)
            log.info(f"{recipe.name} version {found.version} is {uri}")
        if champion_version(client, recipe.name) != str(found.version):
            client.set_model_version_tag(recipe.name, found.version, REGISTERED_BY, current_owner())
            client.set_registered_model_alias(recipe.name, CHALLENGER, found.version)
    return Version(
        uri=uri,
        digest=digest,
        store=store.identity,
        started=started,
        seconds=time.time() - started,
        name=recipe.name,
        version=str(found.version),
        run_id=found.run_id or "",
    )


def adapter_facts(directory: Path) -> dict[str, Any]:
    """What the manifest says of an adapter: its rank, and the dtype of the model that it makes of its base."""
    adapter = json.loads((directory / ADAPTER / "adapter_config.json").read_text())
    model = json.loads((directory / "model" / "config.json").read_text())
    return {"rank": adapter["r"], "dtype": model["dtype"]}


def find_version_of_model(client: Any, name: str, model_digest: str, store: Store) -> Any:
    """The version of this model whose package is there, or None."""
    for found in client.search_model_versions(f"name = '{name}' and tags.{MODEL_DIGEST} = '{model_digest}'"):
        if store.exists(f"models/{name}/{found.source.rpartition('/')[2]}"):
            return found
    return None


def record_run(
    client: Any,
    recipe: Recipe,
    dataset: Dataset,
    evaluation: Evaluation,
    training: dict[str, Any],
    facts: dict[str, Any],
    settings: Settings,
    store: Store,
) -> str:
    """Write the run (parameters, metrics, loss curve, data set, report); returns its id.

    A run that was cut off before it was finished is removed and written again.
    """
    from mlflow.entities import Dataset as LoggedDataset
    from mlflow.entities import DatasetInput, Metric, Param

    digest = facts["model_digest"]
    experiment = client.get_experiment_by_name(recipe.name)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(recipe.name, artifact_location=artifact_root(settings))
    )
    for run in client.search_runs([experiment_id], f"tags.{MODEL_DIGEST} = '{digest}'"):
        if run.info.status == "FINISHED":  # by an attempt that was broken off before there was a version
            log_evaluation(client, run.info.run_id, evaluation, store)
            return str(run.info.run_id)
        client.delete_run(run.info.run_id)
    run_id = str(
        client.create_run(
            experiment_id,
            tags={MODEL_DIGEST: digest, "made_by": facts["made_by"]},
            run_name=f"{recipe.name}-{digest[:12]}",
        ).info.run_id
    )
    now = int(time.time() * 1000)
    metrics = [
        Metric(name, point[name], now, int(point["step"]))
        for point in training["curve"]
        for name in ("loss", "heldout_loss")
        if name in point
    ]
    metrics.append(Metric("tokens_per_second", training["tokens_per_second"], now, 0))
    client.log_batch(run_id, metrics, [Param(*item) for item in flatten(recipe.model_dump(mode="json"))])
    source = json.dumps({"uri": dataset.uri})
    client.log_inputs(
        run_id, [DatasetInput(LoggedDataset(recipe.name, dataset.digest[:36], "local", source))]
    )  # 36: MLflow's limit
    log_evaluation(client, run_id, evaluation, store)
    client.set_terminated(run_id)
    return run_id


def log_evaluation(client: Any, run_id: str, evaluation: Evaluation, store: Store) -> None:
    """Write scores and report to a run, in place of those of an evaluation before."""
    for name, value in metrics_of(evaluation).items():
        client.log_metric(run_id, name, value)
    client.log_artifact(run_id, str(store.path(evaluation.report)))


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """The scores of an evaluation that there are."""
    names = ("score", "score_base", "score_champion", "exact_match", "nll", "nll_base", "json_validity")
    return {name: value for name in names if (value := getattr(evaluation, name)) is not None}


def flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as dotted names and texts, in order."""
    flat: list[tuple[str, str]] = []
    for name, part in value.items():
        flat += flatten(part, f"{prefix}{name}.") if isinstance(part, dict) else [(f"{prefix}{name}", str(part))]
    return flat
