"""A cluster on which a day's executions run once. Tests check their results, in any order."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.apart.flyte import Execution, Flyte, NodeRun
from tests.apart.package import Package, make_package
from tests.apart.pods import Interrupt, Pods
from tests.apart.services import Services, services

PROJECT = Path(__file__).parents[2]
PIPELINE = "workflows.training_pipeline.training_pipeline"
FIRST_SERVED = "meta-llama/Meta-Llama-3.1-70B-Instruct"  # what a new cluster serves, according to the documentation


def recipe(**sections: Any) -> str:
    """The shipped tiny recipe as YAML, made faster. `sections` changes keys of a section, or replaces other values."""
    content = yaml.safe_load((PROJECT / "recipes" / "tiny-cpu.yaml").read_text())
    content["data"]["demonstration"] = {"rows": 6000}
    content["evaluation"]["items"] = 64
    content["gate"] = {
        "metric": "nll",
        "min_json_validity": 0.0,
        "min_finished": 0.0,
    }  # a model trained for a few seconds answers badly
    content["serving"] = {"replay": 8, "watch_seconds": 1, "max_latency_ratio": 100, "replaces": [FIRST_SERVED]}
    for name, value in sections.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    return yaml.safe_dump(content)


def adapter(seed: int, **more: Any) -> str:
    """A recipe for an adapter on the champion."""
    training = {"method": "lora", "lora": {"rank": 8}, "learning_rate": 0.001, "epochs": 0.3, "seed": seed, **more}
    content = yaml.safe_load(recipe(training=training))
    content["model"] = {"base": "models:/dates/1"}
    content["data"]["shards"] = 2
    return yaml.safe_dump(content)


@dataclass
class Cluster:
    """A project's services and package, and its executions by title."""

    project: Path
    folder: Path
    services: Services
    package: Package
    flyte: Flyte
    executions: dict[str, Execution] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, title: str, start: Callable[[], Execution]) -> Execution:
        """Run an execution, and keep it and its duration."""
        started = time.monotonic()
        self.executions[title] = start()
        self.seconds[title] = time.monotonic() - started
        print(f"{title}: {self.executions[title].phase} after {self.seconds[title]:.0f} s")
        return self.executions[title]

    def pipeline(self, title: str, text: str, **options: Any) -> Execution:
        """Run the pipeline with a recipe."""
        return self.run(title, lambda: self.flyte.run(PIPELINE, {"data_path": "", "recipe": text}, **options))

    def changed_copy(self, name: str, *changes: tuple[str, str, str]) -> tuple[Path, Flyte]:
        """A copy of the project with changed files, and Flyte with its package on the same services."""
        copy = self.folder / name
        for part in ("forge", "tasks", "workflows", "recipes", "images", "infra"):
            shutil.copytree(self.project / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file, old, new in changes:
            text = (copy / file).read_text()
            assert old in text, f"{file} has no {old!r}"
            (copy / file).write_text(text.replace(old, new))
        pods = Pods(copy, self.services, self.folder / f"{name}-pods")
        return copy, Flyte(make_package(copy, self.folder / f"{name}.tgz"), pods)


def truncated_before(execution: Execution, task: str) -> Execution:
    """An execution as it was before a task: without its node, the nodes that contain it, and all later ones."""
    paths = list(execution.nodes)
    (index,) = [index for index, path in enumerate(paths) if execution.nodes[path].task.endswith(f".{task}")]
    kept = {
        path: NodeRun(run.task, run.phase, outputs=run.outputs)
        for path, run in list(execution.nodes.items())[:index]
        if not paths[index].startswith(f"{path}/")
    }
    return Execution(execution.name, execution.launch_plan, execution.inputs, nodes=kept)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster as documented, on which nothing has run yet."""
    folder = tmp_path_factory.mktemp("apart")
    with services(PROJECT, folder / "services") as running:
        package = make_package(PROJECT, folder / "package.tgz")
        yield Cluster(PROJECT, folder, running, package, Flyte(package, Pods(PROJECT, running, folder / "pods")))


@pytest.fixture(scope="session")
def used_cluster(cluster: Cluster) -> Cluster:
    """The cluster after a day of use: models were trained, served and rejected, and a rollout failed."""
    flyte, serving = cluster.flyte, cluster.services.serving
    cluster.pipeline("first", recipe())
    cluster.pipeline("repeated", recipe())
    cluster.pipeline("adapter", adapter(1), interrupt={"train_on_1x2": Interrupt("processes on cpu", signal.SIGTERM)})
    cluster.pipeline("rejected", recipe(training={"epochs": 0.05}))
    check = {"data_path": "", "recipe": recipe()}
    cluster.run("check", lambda: flyte.run("workflows.champion_check.champion_check", check))
    cluster.run("rollback", lambda: flyte.run("workflows.rollback.rollback", {"name": "dates", "to": "1"}))
    retention = {"name": "", "keep": 1, "days": 0.0, "apply": True}
    cluster.run("retention", lambda: flyte.run("workflows.registry.retention", retention))
    # Without the reconciler nothing changes what is served, so two rollouts fail. Then it runs again.
    content = yaml.safe_load(adapter(2))
    content["serving"]["startup_timeout"] = 10
    failed = cluster.pipeline("failed", yaml.safe_dump(content), before={"roll_out": serving.stop_reconciler})
    failed_again = cluster.run("failed again", lambda: flyte.recover(failed))
    serving.start_reconciler()
    cluster.run("recovered", lambda: flyte.recover(failed_again))
    return cluster
