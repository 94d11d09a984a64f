"""A server of registered versions that needs no training: a random base and adapters on it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from openai import OpenAI

from forge.core.recipe import ServingRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import PACKAGE_DIGEST, champion_version, open_registry
from forge.registry.packages import open_package
from forge.registry.promotion import promotions
from forge.serving.desired import Served
from forge.serving.local_target import LocalTarget
from forge.serving.vllm_process import LocalServer
from forge.storage import DirectoryStore
from tasks.rollout.rollout import Candidate, serve
from tests.integration.harness import PROJECT
from tests.serving.models import publish, write_adapter, write_base

SWAP = """
import sys
from pathlib import Path
from forge.core.logs import start_logging
from forge.core.recipe import ServingRecipe
from tasks.rollout.rollback import roll_back
from forge.core.settings import load_settings
from forge.storage import open_store
start_logging("rollback")
settings = load_settings()
recipe = ServingRecipe(watch_seconds=float(sys.argv[2]), startup_timeout=180, max_latency_ratio=100)
roll_back("dates", sys.argv[1], recipe, settings, open_store(settings))
"""


class Server:
    """A home that serves version 1 (a base) or one of the versions 2 and 3 (adapters on it)."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.settings = Settings(home=folder / "home", serving_port=probe.getsockname()[1])
        self.store = DirectoryStore(self.settings.store_root)
        base = write_base(folder / "base")
        first = publish(self.store, base, "dates", 1)
        adapters = [
            publish(self.store, write_adapter(folder / str(seed), base, seed=seed), "dates", seed, first)
            for seed in (2, 3)
        ]
        self.versions: dict[str, Served] = {served.version: served for served in (first, *adapters)}
        client = open_registry(self.settings)
        client.create_registered_model("dates")
        for served in self.versions.values():
            client.create_model_version("dates", source=served.uri, tags={PACKAGE_DIGEST: served.digest})
        self.rollout: subprocess.Popen | None = None
        self.target = LocalTarget(self.settings)
        package, manifest = open_package(first.uri, first.digest, self.settings, self.store)
        candidate = Candidate(first, package, manifest, None, "", "the first")
        serve(candidate, ServingRecipe(watch_seconds=0), self.settings, self.store)

    def swap(self, to: str = "", watch: float = 1) -> subprocess.Popen:
        """Start a process that serves a version (default: the adapter that is not the champion)."""
        to = to or next(version for version in ("2", "3") if version != self.champion())
        environment = os.environ | {
            "FORGE_HOME": str(self.settings.home),
            "FORGE_SERVING_PORT": str(self.settings.serving_port),
        }
        self.rollout = subprocess.Popen(
            [sys.executable, "-c", SWAP, to, str(watch)], cwd=PROJECT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self.rollout

    def stop(self) -> None:
        """Stop all processes."""
        if self.rollout is not None and self.rollout.poll() is None:
            self.rollout.kill()
        self.target.stop()
        LocalServer(self.settings).stop()

    def champion(self) -> str:
        """The champion's version."""
        return champion_version(open_registry(self.settings), "dates") or ""

    def victim(self, role: str, rollout: subprocess.Popen) -> int:
        """The ID of the process to kill."""
        if role == "rollout":
            return rollout.pid
        if role == "reconciler":
            return int(json.loads(self.target.record.read_text())["pid"])
        running = LocalServer(self.settings).running()
        assert running is not None
        return running.pid

    def settle(self) -> None:
        """Wait until the desired state is reached without a trial; restarts a dead reconciler, as Kubernetes would."""
        deadline = time.monotonic() + 240
        while True:
            self.target.ensure()
            actual, (desired, _) = self.target.status(), self.target.document.read()
            if actual and desired.trial is None and (actual.generation, actual.waiting) == (desired.generation, ""):
                return
            assert time.monotonic() < deadline, f"{actual}\n{desired}\n{self.target.log.read_text()[-3000:]}"
            time.sleep(0.2)

    def agrees(self) -> None:
        """Assert that registry, history, desired state and vLLM agree on the version."""
        champion = self.champion()
        desired, _ = self.target.document.read()
        assert desired.serving.names == {"dates": self.versions[champion].versioned}
        assert promotions(self.store, "dates")[-1].version == champion
        client = OpenAI(base_url=self.settings.endpoint, api_key="EMPTY", max_retries=0)
        messages = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model="dates", messages=messages, max_tokens=4)
        assert answer.model == self.versions[champion].versioned
