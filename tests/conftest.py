"""Shared fixtures: a small recipe, an empty store, and a model that is trained once."""

import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from forge.core.contracts import Base, Champion, Dataset, Evaluation, Model, Source
from forge.core.logs import LOGGERS
from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.registry import mlflow_registry
from forge.storage import DirectoryStore

# Tests run in parallel, and a thread of OpenMP that waits for work keeps a core busy. Set before torch is imported.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ.update(ONE_THREAD)
PROJECT = Path(__file__).parent.parent
SLOWEST = ("apart", "finetune", "integration")
SMALL = {
    "name": "dates",
    "data": {"source": "demonstration", "demonstration": {"rows": 1200}, "max_seq_len": 128},
    "model": {"architecture": {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128}},
    "training": {"global_batch_size": 8, "epochs": 1, "learning_rate": 0.004, "precision": "fp32"},
    "evaluation": {"items": 32, "max_new_tokens": 32},
    # After seconds of training it answers badly.
    "gate": {"metric": "nll", "min_json_validity": 0.0, "min_finished": 0.0},
}


class Scheduling(LoadFileScheduling):
    """Runs the tests of a file on one worker, in order, and those of two files too that share a cluster of minutes."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = nodeid.partition("::")[0]
        return file.replace("apart/test_mutations", "apart/test_pipeline")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Distribute the tests over the workers."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the folders that take longest."""
    items.sort(key=lambda item: item.path.parent.name not in SLOWEST)


@pytest.fixture(autouse=True)
def _log_info() -> Iterator[None]:
    """Log from level INFO, so that `caplog` sees it; handlers that a test adds are removed."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.setLevel(logging.INFO)
    yield
    for logger in loggers:
        logger.handlers = []


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test its own home, whatever the developer's environment says."""
    for name in list(os.environ):
        if name.startswith(("FORGE_", "AWS_")) and not name.startswith("FORGE_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True, scope="session")
def _migrate_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy the tables of an embedded registry from the first one. MLflow's migrations take more than a second."""
    tables = tmp_path_factory.mktemp("tables") / "mlflow.db"

    def configure_client() -> None:  # open_registry calls it before it imports MLflow, which few tests need
        configured()
        from mlflow.store.db import utils

        migrate = utils._initialize_tables

        def initialize(engine: Any) -> None:
            if tables.exists():
                copy_database(tables, engine.url.database)
            else:
                migrate(engine)
                copy_database(engine.url.database, tables)

        patch.setattr(utils, "_initialize_tables", initialize)
        patch.setattr(mlflow_registry, "configure_client", configured)

    configured = mlflow_registry.configure_client
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_registry, "configure_client", configure_client)
        yield


def copy_database(source: Path | str, target: Path | str) -> None:
    """Copy a SQLite database that may be in use."""
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as written:
        read.backup(written)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """A recipe that runs in seconds."""
    return Recipe.model_validate(SMALL)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """An empty store."""
    return DirectoryStore(tmp_path / "store")


def write_jsonl(path: Path, rows: list) -> Path:
    """Write rows as JSONL; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str, **columns: str) -> dict:
    """A row with one question and its answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def start_task(
    flyte_task: Any, inputs: dict[str, Any], outputs: str, folder: Path, **environment: str
) -> subprocess.Popen[str]:
    """Start a Flyte task in a process of its own, as a pod does; its outputs go to a directory or a URI.

    The file `stderr` in the folder gets its standard error; the caller reads its standard output.
    """
    from flytekit import FlyteContextManager
    from flytekit.core.type_engine import TypeEngine

    literals = TypeEngine.dict_to_literal_map(
        FlyteContextManager.current_context(), inputs, flyte_task.python_interface.inputs
    )
    inputs_file = folder / "inputs.pb"
    inputs_file.write_bytes(literals.to_flyte_idl().SerializeToString())
    module, _, name = flyte_task.name.rpartition(".")
    command = [
        Path(sys.executable).with_name("pyflyte-execute"), "--inputs", inputs_file, "--output-prefix", outputs,
        "--raw-output-data-prefix", f"{outputs}/raw", "--checkpoint-path", f"{outputs}/checkpoint",
        "--prev-checkpoint", "", "--resolver", "flytekit.core.python_auto_container.default_task_resolver", "--",
        "task-module", module, "task-name", name,
    ]  # fmt: skip
    inherited = {name: os.environ[name] for name in ("PATH", "FORGE_HOME", *ONE_THREAD)}
    with (folder / "stderr").open("w") as stderr:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**inherited, "PYTHONPATH": str(PROJECT), "HOME": str(folder), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )


@dataclass(frozen=True)
class Trained:
    """A run up to evaluation. The session shares it, so tests must not change it."""

    settings: Settings
    store: DirectoryStore
    dataset: Dataset
    model: Model
    evaluation: Evaluation


@pytest.fixture(scope="session")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The small recipe's data set, model and evaluation, created once per session."""
    import torch  # here, since many tests need neither torch nor the stages

    from tasks.evaluate.evaluate import evaluate
    from tasks.finetune.process_group import Rank
    from tasks.finetune.run import train
    from tasks.preprocess.prepare import prepare
    from tasks.preprocess.sources import digest_source

    settings = Settings(home=tmp_path_factory.mktemp("trained"))
    store = DirectoryStore(settings.store_root)
    source = Source(uri="demonstration", digest=digest_source(recipe.data), store=store.identity)
    dataset = prepare(source, recipe.data, Base(), store, settings)
    rank = Rank(0, 1, torch.device("cpu"))
    model = train(rank, dataset, Base(), recipe.model, recipe.training, store, settings)
    assert model is not None
    return Trained(
        settings,
        store,
        dataset,
        model,
        evaluate(recipe.name, dataset, model, Champion(), recipe.evaluation, recipe.gate, store, settings),
    )
