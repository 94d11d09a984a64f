"""A complete target for rollouts in one process: registry, store, document, reconciler, and a fake vLLM.

Rollouts find it like any local target, through the reconciler's record under .forge/serving/.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient

from forge.core.contracts import Deployment
from forge.core.processes import start_ticks
from forge.core.recipe import ServingRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import PACKAGE_DIGEST, open_registry
from forge.serving.desired import DesiredStore, Served
from forge.serving.local_target import FileDocument, reconciler_lock, reconciler_version
from forge.serving.reconciler import Reconciler, run
from forge.serving.reconciler_status import Status
from forge.serving.trial import FAILED, Recovery
from forge.storage import DirectoryStore
from tasks.rollout.rollout import Candidate, serve
from tests.serving.stand import Stand

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 262,
    "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 128, "dtype": "float32",
}  # fmt: skip
QUICK = ServingRecipe(watch_seconds=0, startup_timeout=60)


class Reader(DirectoryStore):
    """The store with the rights of the reconciler's S3 user: read everything, write leases only."""

    def put(self, key: str, data: bytes) -> None:
        assert key.startswith("leases/"), f"the reconciler writes {key}"
        super().put(key, data)

    def delete(self, key: str) -> None:
        assert key.startswith("leases/"), f"the reconciler deletes {key}"
        super().delete(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise AssertionError(f"the reconciler writes {key}")

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> bool:
        assert key.startswith("leases/"), f"the reconciler writes {key}"
        return super().put_if_unchanged(key, data, version)


@dataclass
class Place:
    """The target, and three versions of the model dates: 1 is a base, 2 and 3 are adapters of it."""

    settings: Settings
    store: DirectoryStore
    stand: Stand
    document: DesiredStore
    client: MlflowClient
    versions: dict[str, Served]

    def candidate(self, version: str, champion: str, **more: Any) -> Candidate:
        """A version that the gate compared with this champion."""
        served = self.versions[version]
        return Candidate(
            served, self.store.path(served.uri), self.store.manifest(served.uri), None, champion, "a test", **more
        )

    def serve(self, version: str, champion: str, recipe: ServingRecipe = QUICK) -> Deployment:
        """Roll a version out."""
        return serve(self.candidate(version, champion), recipe, self.settings, self.store)

    def challenge(self, version: str) -> None:
        """Make a version the challenger, as the register stage does."""
        self.client.set_registered_model_alias("dates", "challenger", version)

    def aliases(self) -> dict[str, str]:
        """The version of each alias."""
        return {alias: str(version) for alias, version in self.client.get_registered_model("dates").aliases.items()}

    def failed(self, version: str) -> str:
        """Why the rollout of a version failed; "" if it has not."""
        return str(self.client.get_model_version("dates", version).tags.get(FAILED, ""))


def publish(store: DirectoryStore, version: str, base: Served | None = None) -> Served:
    """Publish a package without weights, of an adapter if a base is given."""
    facts: dict[str, Any] = {"name": "dates", "kind": "model"}
    if base is not None:
        facts = {**facts, "kind": "adapter", "rank": 8, "base": {"location": base.uri, "revision": base.digest}}
    with store.stage() as staged:
        (staged / "config.json").write_text(json.dumps(CONFIG))
        (staged / "version").write_text(version)
        uri = store.publish(staged, "models/dates", facts=facts)
    return Served(name="dates", version=version, uri=uri, digest=uri.rpartition("sha256-")[2])


@contextlib.contextmanager
def rollout_place(home: Path) -> Iterator[Place]:
    """A place where nothing serves yet, with its reconciler running."""
    stand = Stand(home / "serving" / "names.json")
    settings = Settings(home=home, serving_port=stand.http.server_port)
    store, client, document = DirectoryStore(settings.store_root), open_registry(settings), FileDocument(settings)
    first = publish(store, "1")
    versions = {"1": first, "2": publish(store, "2", first), "3": publish(store, "3", first)}
    client.create_registered_model("dates")
    for one in versions.values():
        client.create_model_version("dates", source=one.uri, tags={PACKAGE_DIGEST: one.digest})
    settings.serving.mkdir(parents=True)
    ended = threading.Event()
    with FileLock(reconciler_lock(settings), thread_local=False):
        reconciler = Reconciler(
            FileDocument(settings),
            stand,
            lambda one: store.path(one.uri),
            lambda one: None,
            Recovery(lambda: Reader(settings.store_root), settings),
            stand.names_file,
        )
        status = Status(reconciler, "127.0.0.1", 0)
        me = {
            "pid": os.getpid(),
            "ticks": start_ticks(os.getpid()),
            "port": status.port,
            "version": reconciler_version(settings),
        }
        (settings.serving / "reconciler.json").write_text(json.dumps(me))
        thread = threading.Thread(target=run, args=(reconciler, 0.02, ended.is_set, status.touch, True))
        thread.start()
        try:
            yield Place(settings, store, stand, document, client, versions)
        finally:
            ended.set()
            thread.join()
            for server in (status.http, stand.http):
                server.shutdown()
                server.server_close()
