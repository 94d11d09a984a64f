"""A cluster, and what was run on it once: the tests only look at it, in any order."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.apart.flyte import Execution, Flyte, Ran
from tests.apart.package import Package, make_package
from tests.apart.pods import Interrupt, Pods
from tests.apart.services import Services, services

PROJECT = Path(__file__).parents[2]
PIPELINE = "workflows.training_pipeline.training_pipeline"
FIRST_SERVED = "meta-llama/Meta-Llama-3.1-70B-Instruct"  # by a cluster as it is documented


def recipe(**sections: Any) -> str:
    """The shipped tiny recipe, made shorter, as YAML; with keys of some sections changed, or whole ones given."""
    made = yaml.safe_load((PROJECT / "recipes" / "tiny-cpu.yaml").read_text())
    made["data"]["demonstration"] = {"rows": 6000}
    made["evaluation"]["items"] = 64
    made["gate"] = {
        "metric": "nll",
        "min_json_validity": 0.0,
        "min_finished": 0.0,
    }  # a model of a few seconds answers badly
    made["serving"] = {"replay": 8, "watch_seconds": 1, "max_latency_ratio": 100, "replaces": [FIRST_SERVED]}
    for name, value in sections.items():
        made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
    return yaml.safe_dump(made)


def adapter(seed: int, **more: Any) -> str:
    """A recipe of an adapter on the champion."""
    training = {"method": "lora", "lora": {"rank": 8}, "learning_rate": 0.001, "epochs": 0.3, "seed": seed, **more}
    text = yaml.safe_load(recipe(training=training))
    text["model"] = {"base": "models:/dates/1"}
    text["data"]["shards"] = 2
    return yaml.safe_dump(text)


@dataclass
class Cluster:
    """A project's services and its package, and what became of the executions by name."""

    project: Path
    folder: Path
    services: Services
    package: Package
    flyte: Flyte
    ran: dict[str, Execution] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, title: str, start: Callable[[], Execution]) -> Execution:
        """Follow an execution, and keep it with its time."""
        began = time.monotonic()
        self.ran[title] = start()
        self.seconds[title] = time.monotonic() - began
        print(f"{title}: {self.ran[title].phase} after {self.seconds[title]:.0f} s")
        return self.ran[title]

    def pipeline(self, title: str, text: str, **how: Any) -> Execution:
        """Run the pipeline with a recipe."""
        return self.run(title, lambda: self.flyte.run(PIPELINE, {"data_path": "", "recipe": text}, **how))

    def changed(self, name: str, *changes: tuple[str, str, str]) -> tuple[Path, Flyte]:
        """A copy of the project in which a file's text is another, and Flyte with its package, on the same services."""
        copy = self.folder / name
        for part in ("forge", "tasks", "workflows", "recipes", "images", "infra"):
            shutil.copytree(self.project / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file, old, new in changes:
            text = (copy / file).read_text()
            assert old in text, f"{file} has no {old!r}"
            (copy / file).write_text(text.replace(old, new))
        pods = Pods(copy, self.services, self.folder / f"{name}-pods")
        return copy, Flyte(make_package(copy, self.folder / f"{name}.tgz"), pods)


def without(execution: Execution, task: str) -> Execution:
    """An execution of which a task, and what holds its node or comes after it, is yet to be run."""
    paths = list(execution.nodes)
    (at,) = [at for at, path in enumerate(paths) if execution.nodes[path].task.endswith(f".{task}")]
    kept = {
        path: Ran(ran.task, ran.phase, outputs=ran.outputs)
        for path, ran in list(execution.nodes.items())[:at]
        if not paths[at].startswith(f"{path}/")
    }
    return Execution(execution.name, execution.started, execution.inputs, nodes=kept)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The documented cluster on which nothing has been run yet, or the one that FORGE_TEST_APART_PROJECT has."""
    folder = tmp_path_factory.mktemp("apart")
    with services(PROJECT, folder / "services") as here:
        package = make_package(PROJECT, folder / "package.tgz")
        yield Cluster(PROJECT, folder, here, package, Flyte(package, Pods(PROJECT, here, folder / "pods")))


@pytest.fixture(scope="session")
def story(cluster: Cluster) -> Cluster:
    """The cluster after a day: models that were trained, served, refused, and whose rollout failed."""
    here, serving = cluster, cluster.services.serving
    here.pipeline("first", recipe())
    here.pipeline("again", recipe())
    here.pipeline("adapter", adapter(1), interrupt={"train_on_1x2": Interrupt("processes on cpu", signal.SIGTERM)})
    here.pipeline("refused", recipe(training={"epochs": 0.05}))
    check = {"data_path": "", "recipe": recipe()}
    here.run("check", lambda: here.flyte.run("workflows.champion_check.champion_check", check))
    here.run("rollback", lambda: here.flyte.run("workflows.rollback.rollback", {"name": "dates", "to": "1"}))
    wanted = {"name": "", "keep": 1, "days": 0.0, "apply": True}
    here.run("retention", lambda: here.flyte.run("workflows.registry.retention", wanted))
    # Nobody makes what is served what should be: two rollouts fail, and then the reconciler is there again.
    text = yaml.safe_load(adapter(2))
    text["serving"]["startup_timeout"] = 10
    failed = here.pipeline("failed", yaml.safe_dump(text), before={"roll_out": serving.stop_reconciler})
    twice = here.run("failed again", lambda: here.flyte.recover(failed))
    serving.start_reconciler()
    here.run("recovered", lambda: here.flyte.recover(twice))
    return here
