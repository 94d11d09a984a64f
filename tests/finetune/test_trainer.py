"""The loop on one process: it does what a plain loop does, and what breaks it off costs nothing."""

import json
import os
import re
import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from forge.core.errors import ForgeError
from forge.core.recipe import Lora, ModelRecipe, TrainingRecipe
from forge.registry.packages import LocalBase
from tasks.finetune.data import Batch
from tasks.finetune.export import export
from tasks.finetune.model import build_quantised
from tasks.finetune.process_group import Rank, Stopped
from tasks.finetune.schedule import share
from tasks.finetune.train import Trainer, TrainingJob
from tests.finetune.job import CONFIGS, SMALL, write_base, write_data

STEPS = 12  # of the recipe below on the rows below


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Packed rows, and a base model."""
    directory = tmp_path_factory.mktemp("job")
    return write_data(directory / "data"), write_base(CONFIGS["llama"], directory / "base")


def job(places: tuple[Path, Path], checkpoints: Path, **training: Any) -> TrainingJob:
    """Twelve steps of full fine-tuning, or what the keywords say."""
    data, base = places
    recipe = {"global_batch_size": 8, "epochs": 2, "learning_rate": 0.01, "precision": "fp32", **training}
    return TrainingJob(data, LocalBase(str(base)), ModelRecipe(base=str(base)), TrainingRecipe(**recipe), checkpoints)


def rank() -> Rank:
    return Rank(0, 1, torch.device("cpu"))


def trained(job: TrainingJob) -> Trainer:
    """The job, done."""
    trainer = Trainer(rank(), job)
    trainer.train()
    return trainer


def stopped(job: TrainingJob, after: int) -> None:
    """The job, told to stop in the middle of a step."""
    trainer = Trainer(rank(), job)
    in_step(trainer, after, trainer.rank.stop.set)
    with pytest.raises(Stopped, match=f"after step {after} of {STEPS}"):
        trainer.train()


def in_step(trainer: Trainer, number: int, what: Callable[[], object]) -> None:
    """Have something happen in the forward pass of a step."""

    def hook(*_: object) -> None:
        if trainer.facts.step == number - 1 and trainer.loss.training:
            what()

    trainer.loss.register_forward_pre_hook(hook)


def same(one: Trainer, other: Trainer) -> bool:
    """Whether two trainers have the same weights, bit for bit, and the same losses."""
    pairs = zip(one.causal.state_dict().values(), other.causal.state_dict().values(), strict=True)
    losses = [[(point["step"], point["loss"]) for point in trainer.facts.curve] for trainer in (one, other)]
    # As bytes: 4-bit weights that are kept in floats may look like no number, which equals nothing.
    weights = all(torch.equal(*(each.flatten().view(torch.uint8) for each in pair)) for pair in pairs)
    return weights and losses[0] == losses[1]


def test_fifty_steps_are_those_of_a_plain_loop(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints", epochs=50 * 8 / 48, learning_rate=1e-3))
    assert trainer.order.steps == 50
    plain = AutoModelForCausalLM.from_pretrained(places[1])
    decayed = [parameter for parameter in plain.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in plain.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses = []
    for step in range(50):
        batch = trainer.rows.batch(trainer.order.step(step))
        tokens, targets = padded(batch)
        logits = plain(input_ids=tokens, attention_mask=tokens != 0).logits  # token 0 is the padding
        total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        count = int((targets != -100).sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * share("cosine", step, 50, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
    trainer.train()
    ours = [point["loss"] for point in trainer.facts.curve]
    assert len(ours) == 50
    assert max(abs(one - other) for one, other in zip(ours, losses, strict=True)) < 1e-4


def padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The documents of packed rows, each a row of its own: tokens and targets."""
    tokens: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for row, positions in enumerate(batch.positions):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        tokens += [batch.tokens[row, begin:end] for begin, end in pairwise(starts)]
        targets += [batch.targets[row, begin:end] for begin, end in pairwise(starts)]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(tokens, batch_first=True), pad(targets, batch_first=True, padding_value=-100)


@pytest.mark.parametrize("after", [1, 5])
def test_a_job_that_is_stopped_goes_on_as_if_nothing_had_been(
    places: tuple[Path, Path], tmp_path: Path, after: int
) -> None:
    broken = job(places, tmp_path / "checkpoints", lora=Lora(dropout=0.1), method="lora")
    stopped(broken, after)
    stopped(broken, 9)
    again = Trainer(rank(), broken)
    assert again.facts.step == 9
    again.train()
    assert same(again, trained(job(places, tmp_path / "other", lora=Lora(dropout=0.1), method="lora")))


def test_a_checkpoint_that_was_not_completed_does_not_count(places: tuple[Path, Path], tmp_path: Path) -> None:
    broken = job(places, tmp_path / "checkpoints")
    stopped(broken, 4)
    (tmp_path / "checkpoints" / "00000007.partial").mkdir()
    again = Trainer(rank(), broken)
    assert again.facts.step == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000004"]


def test_a_checkpoint_that_cannot_be_written_or_read_is_told(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints", checkpoint_steps=2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))  # bytes of a file, as on a disk that is full
    try:
        with pytest.raises(ForgeError, match=r"checkpoint in .* cannot be written \(.*File too large.*\); free space"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = job(places, tmp_path / "others")
    stopped(whole, 4)
    (data,) = (tmp_path / "others" / "00000004").glob("*.distcp")
    os.truncate(data, 100)
    with pytest.raises(ForgeError, match=r"checkpoint .*00000004 cannot be read \(.*\); remove it"):
        Trainer(rank(), whole)


def test_only_the_last_checkpoints_are_kept(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = trained(job(places, tmp_path / "checkpoints", checkpoint_steps=2, keep_checkpoints=3))
    trainer.checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000008", "00000010", "00000012"]
    trainer.checkpoints.remove()
    assert list(tmp_path.iterdir()) == []


def test_how_rows_are_taken_changes_nothing(places: tuple[Path, Path], tmp_path: Path) -> None:
    losses = [
        [point["loss"] for point in trained(job(places, tmp_path / str(number), **how)).facts.curve]
        for number, how in enumerate(
            (
                {},
                {"micro_batch_size": 2},
                {"activation_checkpointing": "selective"},
                {"activation_checkpointing": "full"},
            )
        )
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_training_stops_early_and_leaves_the_best_weights(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = trained(job(places, tmp_path / "checkpoints", epochs=40, learning_rate=0.02, early_stopping_patience=2))
    held_out = [point for point in trainer.facts.curve if "heldout_loss" in point]
    best = min(held_out, key=lambda point: point["heldout_loss"])
    assert trainer.facts.step < trainer.order.steps, "48 rows are soon learned by heart"
    assert trainer.facts.best_step == best["step"] == held_out[-3]["step"]
    assert trainer.heldout_loss() == pytest.approx(best["heldout_loss"], rel=1e-6)


def test_a_step_without_a_finite_loss_is_left_out_and_counted(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints"))
    weight = trainer.causal.get_input_embeddings().weight
    kept: list[torch.Tensor] = []

    def spoil() -> None:
        kept.append(weight.detach().clone())
        weight.data.fill_(float("nan"))

    in_step(trainer, 3, spoil)
    in_step(trainer, 4, lambda: weight.data.copy_(kept[0]))
    trainer.train()
    assert trainer.facts.skipped == [3]
    assert all(torch.isfinite(parameter).all() for parameter in trainer.causal.parameters())


def test_a_gradient_that_explodes_is_left_out(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints", epochs=7, learning_rate=1e-4))
    head = trainer.causal.get_output_embeddings().weight
    in_step(trainer, 35, lambda: head.data.mul_(1e4))
    in_step(trainer, 36, lambda: head.data.div_(1e4))
    trainer.train()
    assert trainer.facts.skipped == [35]


def test_too_many_bad_steps_end_the_job_with_their_rows(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints", max_skipped_steps=1))
    in_step(trainer, 2, lambda: trainer.causal.get_input_embeddings().weight.data.fill_(float("nan")))
    rows = ", ".join(map(str, sorted(trainer.order.step(2))))
    with pytest.raises(ForgeError, match=f"step 3: the loss is not finite; .*packed rows {rows} of .*2 steps"):
        trainer.train()


@pytest.mark.parametrize("shape", ["llama", "gemma2", "phi3"])
def test_an_adapter_that_was_exported_has_the_logits_that_training_had(shape: str, tmp_path: Path) -> None:
    here = write_data(tmp_path / "data"), write_base(CONFIGS[shape], tmp_path / "base")
    lora = Lora(rank=4, alpha=8, use_rslora=True)
    trainer = trained(job(here, tmp_path / "checkpoints", method="lora", lora=lora, epochs=1))
    export(trainer, tmp_path / "out")
    tokens = trainer.heldout.batch(torch.arange(2).numpy()).tokens[:, :20]
    with torch.no_grad():
        ours = trainer.causal.eval()(input_ids=tokens).logits
        base = AutoModelForCausalLM.from_pretrained(here[1])
        before = base(input_ids=tokens).logits.clone()
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(input_ids=tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")(input_ids=tokens).logits
    torch.testing.assert_close(adapted, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, ours, rtol=1e-3, atol=1e-3)
    assert (before - ours).abs().max() > 0.01, "it has learned something"


def test_an_adapter_of_a_quantised_base_is_trained_exported_and_gone_on_with(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    how = {"method": "qlora", "lora": Lora(rank=4, dropout=0.1)}
    whole = trained(job(places, tmp_path / "whole", **how))
    assert whole.facts.curve[-1]["loss"] < 0.95 * whole.facts.curve[0]["loss"]
    broken = job(places, tmp_path / "checkpoints", **how)
    stopped(broken, after=6)
    assert same(trained(broken), whole)
    export(whole, tmp_path / "out")
    tokens = whole.heldout.batch(torch.arange(2).numpy()).tokens[:, :20]
    with torch.no_grad():
        ours = whole.causal.eval()(input_ids=tokens).logits
        base = build_quantised(LocalBase(str(places[1])), torch.float32, torch.device("cpu"))
        before = base(input_ids=tokens).logits.clone()
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(input_ids=tokens).logits
    torch.testing.assert_close(adapted, ours, rtol=1e-3, atol=1e-3)
    assert (before - ours).abs().max() > 0.01, "it has learned something"
    exact = AutoModelForCausalLM.from_pretrained(places[1])(input_ids=tokens).logits
    assert (before - exact).abs().max() > 0.01, "it is quantised"


def test_what_is_exported_is_complete(places: tuple[Path, Path], tmp_path: Path) -> None:
    export(trained(job(places, tmp_path / "checkpoints", precision="bf16")), tmp_path / "out")
    card = json.loads((tmp_path / "out" / "training.json").read_text())
    assert card["steps"] == STEPS
    assert card["skipped_steps"] == []
    assert card["tokens_per_second"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.dtype == torch.bfloat16
    assert {path.suffix for path in (tmp_path / "out" / "model").iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_out_of_memory_names_what_was_estimated_and_what_helps(tmp_path: Path) -> None:
    wide = LlamaConfig(**{**SMALL, "intermediate_size": 1 << 16, "tie_word_embeddings": False})
    here = write_data(tmp_path / "data"), write_base(wide, tmp_path / "base")
    trainer = Trainer(rank(), job(here, tmp_path / "checkpoints"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # The rows of a step need some 0.5 GiB for the forward pass alone.
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (200 << 20), hard))
    try:
        with pytest.raises(ForgeError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert re.search(r"out of memory: you tried to allocate \d+ bytes", caught.value.message)
    for part in ("estimated to need", "GiB (weights", "less is needed with training.micro_batch_size"):
        assert part in caught.value.message
