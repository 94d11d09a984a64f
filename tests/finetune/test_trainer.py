"""The training loop in one process: it equals a plain loop, and interruptions do not change the result."""

import json
import os
import re
import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
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
from tasks.finetune.schedule import lr_factor
from tasks.finetune.telemetry import METRICS
from tasks.finetune.train import Trainer, TrainingJob
from tests.finetune.job import CONFIGS, SMALL, write_base, write_data

STEPS = 12  # of `job` on the rows of `places`


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Packed rows, and a base model."""
    directory = tmp_path_factory.mktemp("job")
    return write_data(directory / "data"), write_base(CONFIGS["llama"], directory / "base")


def job(places: tuple[Path, Path], checkpoints: Path, **training: Any) -> TrainingJob:
    """Twelve steps of full fine-tuning; keywords change the recipe."""
    data, base = places
    recipe = {"global_batch_size": 8, "epochs": 2, "learning_rate": 0.01, "precision": "fp32", **training}
    return TrainingJob(data, LocalBase(str(base)), ModelRecipe(base=str(base)), TrainingRecipe(**recipe), checkpoints)


def rank() -> Rank:
    """The only rank."""
    return Rank(0, 1, torch.device("cpu"))


def trained(job: TrainingJob) -> Trainer:
    """Run the job to its end."""
    trainer = Trainer(rank(), job)
    trainer.train()
    return trainer


def stopped(job: TrainingJob, after: int) -> None:
    """Run the job until it is stopped in the middle of a step."""
    trainer = Trainer(rank(), job)
    in_step(trainer, after, trainer.rank.stop.set)
    with pytest.raises(Stopped, match=f"after step {after} of {STEPS}"):
        trainer.train()


def in_step(trainer: Trainer, number: int, action: Callable[[], object]) -> None:
    """Call a function in the forward pass of a step."""

    def hook(*_: object) -> None:
        if trainer.state.step == number - 1 and trainer.loss.training:
            action()

    trainer.loss.register_forward_pre_hook(hook)


def same(one: Trainer, other: Trainer) -> bool:
    """Whether two trainers have the same losses and, bit for bit, the same weights."""
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    losses = [[(point["step"], point["loss"]) for point in trainer.state.curve] for trainer in (one, other)]
    # As bytes: 4-bit weights stored as floats may be NaN, which is not equal to itself.
    weights = all(torch.equal(*(each.flatten().view(torch.uint8) for each in pair)) for pair in pairs)
    return weights and losses[0] == losses[1]


def test_fifty_steps_equal_a_plain_loop(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints", epochs=50 * 8 / 48, learning_rate=1e-3))
    assert trainer.sampler.steps == 50
    plain = AutoModelForCausalLM.from_pretrained(places[1])
    decayed = [parameter for parameter in plain.parameters() if parameter.ndim >= 2]
    not_decayed = [parameter for parameter in plain.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": not_decayed, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses = []
    for step in range(50):
        batch = trainer.rows.batch(trainer.rows.spans(trainer.sampler.rows_of(step), packed=True))
        tokens, targets = padded(batch)
        logits = plain(input_ids=tokens, attention_mask=tokens != 0).logits  # token 0 is the padding
        total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        count = int((targets != -100).sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * lr_factor("cosine", step, 50, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
    trainer.train()
    curve = [point["loss"] for point in trainer.state.curve]
    assert len(curve) == 50
    assert max(abs(ours - plain) for ours, plain in zip(curve, losses, strict=True)) < 1e-4


def padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of packed rows, unpacked to one padded row per document."""
    tokens: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for row, positions in enumerate(batch.positions):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        tokens += [batch.tokens[row, begin:end] for begin, end in pairwise(starts)]
        targets += [batch.targets[row, begin:end] for begin, end in pairwise(starts)]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(tokens, batch_first=True), pad(targets, batch_first=True, padding_value=-100)


@pytest.mark.parametrize("after", [1, 5])
def test_stopped_job_resumes_without_a_difference(places: tuple[Path, Path], tmp_path: Path, after: int) -> None:
    interrupted = job(places, tmp_path / "checkpoints", lora=Lora(dropout=0.1), method="lora")
    stopped(interrupted, after)
    stopped(interrupted, 9)
    resumed = Trainer(rank(), interrupted)
    assert resumed.state.step == 9
    resumed.train()
    assert same(resumed, trained(job(places, tmp_path / "other", lora=Lora(dropout=0.1), method="lora")))


def test_incomplete_checkpoint_is_ignored(places: tuple[Path, Path], tmp_path: Path) -> None:
    interrupted = job(places, tmp_path / "checkpoints")
    stopped(interrupted, 4)
    (tmp_path / "checkpoints" / "00000007.partial").mkdir()
    resumed = Trainer(rank(), interrupted)
    assert resumed.state.step == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000004"]


def test_unwritable_and_damaged_checkpoints_are_clear_errors(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints", checkpoint_steps=2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))  # bytes per file: acts like a full disk
    try:
        with pytest.raises(ForgeError, match=r"takes no file that large .*: checkpoint 2 cannot be written to"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = job(places, tmp_path / "others")
    stopped(whole, 4)
    (data,) = (tmp_path / "others" / "00000004").glob("*.distcp")
    os.truncate(data, 100)
    with pytest.raises(ForgeError, match=r"checkpoint .*00000004 cannot be read \(.*\); remove it"):
        Trainer(rank(), whole)


def test_old_checkpoints_are_pruned(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = trained(job(places, tmp_path / "checkpoints", checkpoint_steps=2, keep_checkpoints=3))
    trainer.checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000008", "00000010", "00000012"]
    trainer.checkpoints.remove()
    assert list(tmp_path.iterdir()) == []


def test_micro_batches_and_activation_checkpointing_do_not_change_losses(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    losses = [
        [point["loss"] for point in trained(job(places, tmp_path / str(number), **how)).state.curve]
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


def test_early_stopping_restores_the_best_weights(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = trained(job(places, tmp_path / "checkpoints", epochs=40, learning_rate=0.02, early_stopping_patience=2))
    held_out = [point for point in trainer.state.curve if "heldout_loss" in point]
    best = min(held_out, key=lambda point: point["heldout_loss"])
    assert trainer.state.step < trainer.sampler.steps, "48 rows are soon memorised"
    assert trainer.state.best_step == best["step"] == held_out[-3]["step"]
    assert trainer.heldout_loss() == pytest.approx(best["heldout_loss"], rel=1e-6)


def test_step_without_a_finite_loss_is_skipped_and_counted(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints"))
    weight = trainer.model.get_input_embeddings().weight
    saved: list[torch.Tensor] = []

    def spoil() -> None:
        saved.append(weight.detach().clone())
        weight.data.fill_(float("nan"))

    in_step(trainer, 3, spoil)
    in_step(trainer, 4, lambda: weight.data.copy_(saved[0]))
    trainer.train()
    assert trainer.state.skipped == [3]
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_step_with_an_exploding_gradient_is_skipped(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints", epochs=7, learning_rate=1e-4))
    head = trainer.model.get_output_embeddings().weight
    in_step(trainer, 35, lambda: head.data.mul_(1e4))
    in_step(trainer, 36, lambda: head.data.div_(1e4))
    trainer.train()
    assert trainer.state.skipped == [35]


def test_too_many_skipped_steps_are_an_error_with_their_rows(places: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = Trainer(rank(), job(places, tmp_path / "checkpoints", max_skipped_steps=1))
    in_step(trainer, 2, lambda: trainer.model.get_input_embeddings().weight.data.fill_(float("nan")))
    rows = ", ".join(map(str, sorted(trainer.sampler.rows_of(2))))
    with pytest.raises(ForgeError, match=f"step 3: the loss is not finite; .*packed rows {rows} of .*2 steps"):
        trainer.train()


@pytest.mark.parametrize("shape", ["llama", "gemma2", "phi3"])
def test_exported_adapter_has_the_logits_of_training(shape: str, tmp_path: Path) -> None:
    paths = write_data(tmp_path / "data"), write_base(CONFIGS[shape], tmp_path / "base")
    lora = Lora(rank=4, alpha=8, use_rslora=True)
    trainer = trained(job(paths, tmp_path / "checkpoints", method="lora", lora=lora, epochs=1))
    export(trainer, tmp_path / "out")
    tokens = trainer.heldout.batch(trainer.heldout.spans(np.arange(2), packed=True)).tokens[:, :20]
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=tokens).logits
        base = AutoModelForCausalLM.from_pretrained(paths[1])
        before = base(input_ids=tokens).logits.clone()
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(input_ids=tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")(input_ids=tokens).logits
    torch.testing.assert_close(adapted, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, ours, rtol=1e-3, atol=1e-3)
    assert (before - ours).abs().max() > 0.01, "the adapter has learned something"


def test_adapter_of_a_quantised_base_is_trained_exported_and_resumed(places: tuple[Path, Path], tmp_path: Path) -> None:
    how = {"method": "qlora", "lora": Lora(rank=4, dropout=0.1)}
    whole = trained(job(places, tmp_path / "whole", **how))
    assert whole.state.curve[-1]["loss"] < 0.95 * whole.state.curve[0]["loss"]
    interrupted = job(places, tmp_path / "checkpoints", **how)
    stopped(interrupted, after=6)
    assert same(trained(interrupted), whole)
    export(whole, tmp_path / "out")
    tokens = whole.heldout.batch(whole.heldout.spans(np.arange(2), packed=True)).tokens[:, :20]
    with torch.no_grad():
        ours = whole.model.eval()(input_ids=tokens).logits
        base = build_quantised(LocalBase(str(places[1])), torch.float32, torch.device("cpu"))
        before = base(input_ids=tokens).logits.clone()
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(input_ids=tokens).logits
    torch.testing.assert_close(adapted, ours, rtol=1e-3, atol=1e-3)
    assert (before - ours).abs().max() > 0.01, "the adapter has learned something"
    exact = AutoModelForCausalLM.from_pretrained(places[1])(input_ids=tokens).logits
    assert (before - exact).abs().max() > 0.01, "the base is quantised"


def test_metrics_are_those_that_telemetry_describes(places: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = trained(job(places, tmp_path / "checkpoints")).metrics()
    assert {*metrics, "mfu"} == set(METRICS)


def test_export_is_complete(places: tuple[Path, Path], tmp_path: Path) -> None:
    export(trained(job(places, tmp_path / "checkpoints", precision="bf16")), tmp_path / "out")
    card = json.loads((tmp_path / "out" / "training.json").read_text())
    assert card["steps"] == STEPS
    assert card["skipped_steps"] == []
    assert card["tokens_per_second"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.dtype == torch.bfloat16
    assert {path.suffix for path in (tmp_path / "out" / "model").iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_out_of_memory_error_names_the_estimate_and_changes_that_help(tmp_path: Path) -> None:
    wide = LlamaConfig(**{**SMALL, "intermediate_size": 1 << 16, "tie_word_embeddings": False})
    paths = write_data(tmp_path / "data"), write_base(wide, tmp_path / "base")
    trainer = Trainer(rank(), job(paths, tmp_path / "checkpoints"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # A step needs about 0.5 GiB for the forward pass alone.
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (200 << 20), hard))
    try:
        with pytest.raises(ForgeError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert re.search(r"out of memory: you tried to allocate \d+ bytes", caught.value.message)
    for part in ("The estimate for one process", "GiB (weights", "set training.micro_batch_size"):
        assert part in caught.value.message
