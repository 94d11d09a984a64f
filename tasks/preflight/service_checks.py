"""Checks of the settings, the store, the registry, and the programs that evaluation and serving need."""

from typing import TYPE_CHECKING

from forge.cluster.gpus import on_cluster
from forge.core.errors import ForgeError
from forge.core.recipe import EvaluationRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import find_champion
from forge.serving.vllm_environment import NO_VLLM, vllm_release
from forge.serving.vllm_process import LocalServer, port_is_free
from forge.storage import Store, open_store
from forge.storage.s3 import connect, split
from tasks.evaluate.champion import find_package

if TYPE_CHECKING:
    from mlflow import MlflowClient


def writable_store(settings: Settings) -> Store:
    """The store, created if it does not exist; ForgeError if it cannot be written."""
    store = open_store(settings)
    _ = store.identity  # written to a new store
    return store


def check_champion(client: "MlflowClient", store: Store, name: str) -> None:
    """Check the package of the champion that the new model will be compared with, if there is a champion."""
    champion = find_champion(client, name)
    if champion is not None:
        find_package(name, champion, store)


def check_cluster_settings(settings: Settings, rollout: bool) -> None:
    """On a cluster, where pods share no directory, check that all results go to services outside the pods."""
    if not on_cluster():
        return
    required: dict[str, str | bool] = {
        "STORE": settings.store, "MLFLOW_URI": settings.mlflow_uri, "CHECKPOINT_COPIES": settings.checkpoint_copies,
        "S3_ENDPOINT": settings.s3_endpoint,
    }  # fmt: skip
    if rollout:
        required |= {
            "SERVING_TARGET=kubernetes (or FORGE_ROLLOUT=false)": settings.serving_target == "kubernetes",
            "SERVING_URL": settings.serving_url, "RECONCILER_URL": settings.reconciler_url,
        }  # fmt: skip
    if missing := [f"FORGE_{name}" for name, value in required.items() if not value]:
        raise ForgeError(
            f"the settings of the cluster's pods lack {', '.join(missing)}",
            fix="set them in the ConfigMap forge-settings",
        )


def check_copies(settings: Settings) -> None:
    """Check that the bucket for copies of checkpoints exists."""
    uri = settings.checkpoint_copies
    if not uri:
        return
    where, (bucket, _) = f"FORGE_CHECKPOINT_COPIES {uri}", split(uri)
    with connect(where, settings) as client:
        if not client.bucket_exists(bucket):
            raise ForgeError(f"there is no bucket {bucket}", where=where, fix="create it, or name another")


def check_engine(recipe: EvaluationRecipe, settings: Settings) -> None:
    """Check that the recipe's inference engine is available where the evaluation will run."""
    if recipe.engine != "vllm":
        return
    if on_cluster():
        raise ForgeError(
            "the image of the evaluation task has no vLLM",
            where="evaluation.engine vllm",
            fix="set it to auto or transformers",
        )
    check_vllm(settings)


def check_vllm(settings: Settings) -> None:
    """Check that vLLM is installed."""
    if not vllm_release(settings.serving_python):
        raise ForgeError(NO_VLLM.format(settings.serving_python))


def check_port(settings: Settings) -> None:
    """Check that the serving port is free, or used by our own server."""
    running = LocalServer(settings).running()
    ours = running is not None and running.spec.port == settings.serving_port
    if not ours and not port_is_free(settings.serving_port):
        raise ForgeError(
            "is in use by another program",
            where=f"port {settings.serving_port}",
            fix="stop it, or set FORGE_SERVING_PORT",
        )
