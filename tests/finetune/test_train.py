"""Training a data set and publishing the model: packing and the number of processes do not change the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge.core.contracts import Base, Model
from forge.core.errors import ForgeError
from forge.core.recipe import ModelRecipe, Recipe
from forge.core.settings import Settings
from forge.registry.packages import LocalBase
from forge.storage import DirectoryStore
from tasks.finetune.checkpoint import Checkpoints
from tasks.finetune.data import PackedRows
from tasks.finetune.loss import TrainedTokenLoss
from tasks.finetune.model import build_model
from tasks.finetune.process_group import Rank
from tasks.finetune.run import train
from tasks.finetune.schedule import lr_factor
from tests.conftest import Trained

ONLY_RANK = Rank(0, 1, torch.device("cpu"))


def retrain(trained: Trained, recipe: Recipe, store: DirectoryStore, **changes: object) -> tuple[Model, dict]:
    """Train on the shared data set with changes to the recipe; returns the model and its card."""
    training = recipe.training.model_copy(update={"epochs": 0.3, **changes})
    model = train(ONLY_RANK, trained.dataset, Base(), recipe.model, training, store, Settings(home=store.root.parent))
    assert model is not None
    return model, json.loads((store.path(model.uri) / "training.json").read_text())


def test_packed_loss_equals_unpacked_loss(trained: Trained, recipe: Recipe) -> None:
    data = trained.store.path(trained.dataset.uri)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    model = build_model(recipe.model, LocalBase(), tokenizer, recipe.data.max_seq_len, 3, torch.float32)
    rows = PackedRows(data / "train")
    numbers = torch.arange(4).numpy()
    packed = TrainedTokenLoss(model)(rows.batch(rows.spans(numbers, packed=True))).item()
    alone = 0.0
    for row in numbers:
        shard = data / "train" / "00000"
        tokens_of_row, trained, document = (
            np.load(shard / f"{name}.npy")[row] for name in ("tokens", "trained", "document")
        )
        for number in range(1, int(document.max()) + 1):
            mask = document == number
            tokens = torch.from_numpy(tokens_of_row[mask].astype("int64"))[None]
            labels = tokens.masked_fill(~torch.from_numpy(trained[mask])[None], -100)
            loss = model(input_ids=tokens, labels=labels).loss  # a mean over trained tokens
            alone += loss.item() * int(trained[mask].sum())
    assert packed == pytest.approx(alone, rel=1e-5)


def test_loss_falls_and_the_card_records_it(trained: Trained) -> None:
    directory = trained.store.path(trained.model.uri)
    card = json.loads((directory / "training.json").read_text())
    assert card["digest"] == trained.model.digest
    assert card["curve"][-1]["loss"] < 0.5 * card["curve"][0]["loss"]
    assert card["curve"][-1]["heldout_loss"] < card["curve"][0]["loss"]
    assert card["tokens_per_second"] > 0
    assert {path.name for path in (directory / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not list(directory.rglob("*.bin"))


def test_training_again_gives_the_same_weights(trained: Trained, recipe: Recipe, store: DirectoryStore) -> None:
    first, _ = retrain(trained, recipe, store)
    again, _ = retrain(trained, recipe, DirectoryStore(store.root.parent / "again"))
    other, _ = retrain(trained, recipe, store, seed=1)
    assert first.digest == again.digest != other.digest


def test_published_model_is_not_trained_again(
    trained: Trained, recipe: Recipe, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the first attempt was interrupted before it removed its checkpoints."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "remove", interrupted)
        retrain(trained, recipe, store, epochs=0.05, checkpoint_steps=1)
    (left,) = (store.root.parent / "checkpoints").iterdir()
    assert any(left.iterdir())
    (published,) = (store.root / "trained").iterdir()
    monkeypatch.setattr("tasks.finetune.run.Trainer", interrupted)
    model, card = retrain(trained, recipe, store, epochs=0.05, checkpoint_steps=1)
    assert (model.uri, model.digest) == (published.as_uri(), card["digest"])
    assert model.base == Base(location=f"{published.as_uri()}/base")
    assert list((store.root.parent / "checkpoints").iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        retrain(trained, recipe, store, epochs=0.1)
    store.remove(model.uri)
    with pytest.raises(KeyboardInterrupt):
        retrain(trained, recipe, store, epochs=0.05, checkpoint_steps=1)


def test_two_processes_give_the_result_of_one(
    trained: Trained, recipe: Recipe, store: DirectoryStore, tmp_path: Path
) -> None:
    one, card = retrain(trained, recipe, store)
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    job = {
        "dataset": trained.dataset.model_dump(),
        "model": recipe.model.model_dump(),
        "training": recipe.training.model_copy(update={"epochs": 0.3, "nproc_per_node": 2}).model_dump(),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(tmp_path)]
    project = str(Path(__file__).parents[2])
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": project}, "text": True}
    outputs = [subprocess.run(command, check=True, capture_output=True, **options).stdout for _ in range(2)]
    assert ["published before" in output for output in outputs] == [False, True], "all ranks agree with the first"
    assert "steps of" not in outputs[1]
    two = next((tmp_path / "two" / "trained").iterdir())
    other = json.loads((two / "training.json").read_text())
    for point, same in zip(card["curve"], other["curve"], strict=True):
        assert point["loss"] == pytest.approx(same["loss"], rel=1e-4)
    weights, same_weights = (
        load_file(store.path(one.uri) / "model" / "model.safetensors"),
        load_file(two / "model" / "model.safetensors"),
    )
    for name, weight in weights.items():
        assert torch.allclose(weight, same_weights[name], atol=1e-3), name


_TWO = """
import json, sys
from pathlib import Path
from forge.core.contracts import Base, Dataset
from tasks.finetune.process_group import process_group
from forge.core.logs import start_logging
from tasks.finetune.run import train
from forge.core.recipe import ModelRecipe, TrainingRecipe
from forge.core.settings import Settings
from forge.storage import DirectoryStore

start_logging("train")
here = Path(sys.argv[1])
job = json.loads((here / "job.json").read_text())
with process_group(here / "failure.json") as rank:
    dataset, model, training = Dataset(**job["dataset"]), ModelRecipe(**job["model"]), TrainingRecipe(**job["training"])
    train(rank, dataset, Base(), model, training, DirectoryStore(here / "two"), Settings(home=here))
"""


def test_base_model_is_fine_tuned(trained: Trained, recipe: Recipe, store: DirectoryStore) -> None:
    base = trained.store.path(trained.model.uri) / "model"
    training = recipe.training.model_copy(update={"epochs": 0.2, "learning_rate": 1e-4})
    model = train(
        ONLY_RANK,
        trained.dataset,
        Base(location=base.as_uri()),
        ModelRecipe(base=str(base)),
        training,
        store,
        Settings(home=store.root.parent),
    )
    assert model is not None
    assert model.base == Base(location=base.as_uri())
    card = json.loads((store.path(model.uri) / "training.json").read_text())
    before = json.loads((trained.store.path(trained.model.uri) / "training.json").read_text())["curve"]
    assert card["curve"][-1]["heldout_loss"] < 1.1 * before[-1]["heldout_loss"], "starts from the base's weights"
    AutoModelForCausalLM.from_pretrained(store.path(model.uri) / "model")


def test_pickled_weights_are_rejected(trained: Trained, recipe: Recipe, store: DirectoryStore, tmp_path: Path) -> None:
    base = trained.store.path(trained.model.uri) / "model"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    torch.save(load_file(base / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ForgeError, match=str(tmp_path)):
        train(
            ONLY_RANK,
            trained.dataset,
            Base(location=tmp_path.as_uri()),
            ModelRecipe(base=str(tmp_path)),
            recipe.training,
            store,
            Settings(home=tmp_path),
        )


def test_excessive_learning_rate_is_an_error_with_its_step(
    trained: Trained, recipe: Recipe, store: DirectoryStore
) -> None:
    with pytest.raises(ForgeError, match=r"step \d+: the (loss|gradient) is not finite; lower training.learning_rate"):
        retrain(trained, recipe, store, learning_rate=1e30, epochs=1)
    assert list(store.root.glob(".staging/*")) == []
    assert not (store.root / "trained").exists()


def test_bf16_training_learns_and_saves_bf16(trained: Trained, recipe: Recipe, store: DirectoryStore) -> None:
    model, card = retrain(trained, recipe, store, precision="bf16")
    weights = load_file(store.path(model.uri) / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}, "saved in the precision of training"
    assert card["curve"][-1]["loss"] < 0.8 * card["curve"][0]["loss"]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_schedule_warms_up_and_ends_near_zero(kind: str) -> None:
    rates = [lr_factor(kind, step, 100, 0.1) for step in range(100)]  # type: ignore[arg-type]
    assert [rates[0], rates[9], rates[10]] == pytest.approx([0.1, 1.0, 1.0])
    assert rates[99] < 0.06
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[79] == 1.0) == (kind == "wsd")
