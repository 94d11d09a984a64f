"""What the tests share: a small recipe, a store of their own, and a model trained once."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tasks.contracts import Base, Dataset, Evaluation, Model, Source
from tasks.evaluate.evaluate import evaluate
from tasks.finetune.processes import Rank
from tasks.finetune.run import train
from tasks.preprocess.prepare import prepare
from tasks.preprocess.sources import digest_source
from tasks.recipe import Recipe
from tasks.settings import Settings
from tasks.storage import DirectoryStore

SMALL = {
    "name": "dates",
    "data": {"source": "demonstration", "demonstration": {"rows": 1200}, "context": 128},
    "model": {"architecture": {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128}},
    "training": {"rows_per_step": 8, "epochs": 1, "learning_rate": 0.004, "precision": "fp32"},
    "evaluation": {"items": 32, "max_new_tokens": 32},
    "gate": {"measure": "nll", "json_validity": 0.0, "ended": 0.0},  # a model of a few seconds answers badly
}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test has a home of its own, whatever the developer's environment says."""
    import os

    for name in list(os.environ):
        if name.startswith(("FORGE_", "AWS_")) and not name.startswith("FORGE_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """A run of a few seconds."""
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
    """A row of one question and its answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


@dataclass(frozen=True)
class Trained:
    """A run up to evaluation: shared by the session, so not to be changed."""

    settings: Settings
    store: DirectoryStore
    dataset: Dataset
    model: Model
    evaluation: Evaluation


@pytest.fixture(scope="session")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The small recipe's data set, model and evaluation, made once."""
    settings = Settings(home=tmp_path_factory.mktemp("trained"))
    store = DirectoryStore(settings.store_root)
    source = Source(uri="demonstration", digest=digest_source(recipe.data), store=store.identity)
    dataset = prepare(source, recipe.data, Base(), store)
    rank = Rank(0, 1, torch.device("cpu"))
    model = train(rank, dataset, Base(), recipe.model, recipe.training, store, settings)
    assert model is not None
    return Trained(
        settings,
        store,
        dataset,
        model,
        evaluate(recipe.name, dataset, model, recipe.evaluation, recipe.gate, store, settings),
    )
