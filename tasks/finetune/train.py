"""The training run: one readable loop, the same on one process or many."""

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from tasks.contracts import Base, Dataset, Model
from tasks.errors import ForgeError
from tasks.finetune.data import Order, PackedRows
from tasks.finetune.model import TrainedTokenLoss, build_model
from tasks.finetune.processes import Rank
from tasks.finetune.progress import TrainingProgress
from tasks.recipe import ModelRecipe, TrainingRecipe
from tasks.storage import DirectoryStore, digest_directory

transformers_logging.disable_progress_bar()
CARD = "training.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # in which the weights are saved, evaluated and served
POINTS = 100  # of the loss curve
HELDOUT_POINTS = 10
HELDOUT_ROWS = 64  # of the held-out rows, for the curve; evaluation scores the rest


def train(
    rank: Rank, dataset: Dataset, base: Base, model: ModelRecipe, recipe: TrainingRecipe, store: DirectoryStore
) -> Model | None:
    """Train on a data set and publish the model; the first rank returns it.

    The result is a directory: `model/` (Hugging Face format, safetensors, with its tokenizer), `base/` (the random
    weights it started from, when trained from scratch) and the card `training.json` (recipe, loss curve, speed).

    Raises ForgeError naming the step where the loss or the gradient is no longer finite.
    """
    started = time.time()
    data = store.path(dataset.uri)
    context = json.loads((data / "dataset.json").read_text())["context"]
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer", trust_remote_code=False)
    causal = build_model(model, base, tokenizer, context, recipe.seed).to(rank.device)
    if not rank.first:
        fit(rank, causal, data, recipe)
        return None
    with store.stage() as staged:
        if model.architecture is not None:
            save(causal, tokenizer, staged / "base")
        curve, tokens_per_second = fit(rank, causal, data, recipe)
        save(causal.to(DTYPES[recipe.precision]), tokenizer, staged / "model")
        digest, _ = digest_directory(staged)
        card = {
            "kind": "model",
            "digest": digest,
            "base": (base if base.location else Base(location="random weights")).model_dump(),
            "dataset": {"uri": dataset.uri, "digest": dataset.digest},
            "parameters": causal.num_parameters(),
            "recipe": {"model": model.model_dump(mode="json"), "training": recipe.model_dump(mode="json")},
            "curve": curve,
            "tokens_per_second": round(tokens_per_second),
            "seconds": round(time.time() - started, 1),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        (staged / CARD).write_text(json.dumps(card, indent=2) + "\n")
        uri = store.publish(staged, "trained")
    if not base.location:
        base = Base(location=f"{uri}/base")
    return Model(
        uri=uri, digest=digest, store=store.identity, base=base, started=started, seconds=time.time() - started
    )


def fit(rank: Rank, causal: Any, data: Path, recipe: TrainingRecipe) -> tuple[list[dict[str, float]], float]:
    """Train the model in place; returns the loss curve and the speed in tokens a second (padding not counted)."""
    rows, heldout = PackedRows(data / "train"), PackedRows(data / "heldout")
    order = Order(len(rows), recipe.rows_per_step, recipe.epochs, recipe.seed)
    loss_of: Any = TrainedTokenLoss(causal)
    if rank.world > 1:
        loss_of = DistributedDataParallel(
            loss_of, device_ids=[rank.device.index] if rank.device.type == "cuda" else None
        )
    optimizer = torch.optim.AdamW(
        causal.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = warmup_cosine(order.steps, recipe.warmup_fraction)
    autocast = torch.autocast(rank.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")

    def train_step(step: int) -> tuple[torch.Tensor, int, int]:
        """One optimizer step. Returns this rank's summed loss, and the trained and all tokens of the global batch."""
        chosen = order.step(step)
        batch = rows.batch(chosen[rank.rank :: rank.world]).to(rank.device)
        trained = int(rows.trained_tokens[chosen].sum())
        with autocast:
            loss = loss_of(batch)
        # Each trained token of the global batch weighs the same; DDP averages over ranks, so undo its division.
        (loss * rank.world / trained).backward()
        norm = torch.nn.utils.clip_grad_norm_(causal.parameters(), recipe.gradient_clip)
        if not torch.isfinite(norm):  # no rank steps, since all have the same gradient
            raise ForgeError(
                f"step {step + 1}: the gradient is not finite; lower training.learning_rate "
                f"(it is {recipe.learning_rate}) or look for broken rows"
            )
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), trained, int(rows.all_tokens[chosen].sum())

    curve: list[dict[str, float]] = []
    every = max(1, order.steps // POINTS)
    heldout_every = every * max(1, POINTS // HELDOUT_POINTS)
    total, trained_since, tokens, waited = torch.zeros((), device=rank.device), 0, 0, 0.0
    if rank.first:
        print(
            f"train: {causal.num_parameters():,} parameters, {order.steps:,} steps of {recipe.rows_per_step} rows, "
            f"{rank.world} process{'es' * (rank.world > 1)} on {rank.device.type}",
            flush=True,
        )
    causal.train()
    with TrainingProgress(order.steps, rank.first) as progress:
        for step in range(order.steps):
            loss, trained, seen = train_step(step)
            total, trained_since, tokens = total + loss, trained_since + trained, tokens + seen
            done = step + 1
            if done % every and done != order.steps:
                continue
            mean = summed(total, rank).item() / trained_since
            if not math.isfinite(mean):
                raise ForgeError(
                    f"step {done}: the loss is not finite; lower training.learning_rate ({recipe.learning_rate})"
                )
            point = {"step": done, "tokens": tokens, "loss": mean}
            if done % heldout_every == 0 or done == order.steps:
                before = time.monotonic()
                point["heldout_loss"] = heldout_loss(rank, loss_of, heldout)
                waited += time.monotonic() - before
            curve.append(point)
            total, trained_since = torch.zeros_like(total), 0
            progress.update(done, mean, tokens)
    return curve, tokens / max(time.monotonic() - progress.started - waited, 1e-9)


def warmup_cosine(steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Share of the learning rate at a step: linear warm-up, then a cosine to zero (https://arxiv.org/abs/1608.03983)."""
    warmup = max(1, round(steps * warmup_fraction))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return share


@torch.no_grad()
def heldout_loss(rank: Rank, loss_of: Any, rows: PackedRows) -> float:
    """Mean loss (nats a trained token) on the first HELDOUT_ROWS held-out rows, shared out among the ranks."""
    loss_of.eval()
    module = loss_of.module if isinstance(loss_of, DistributedDataParallel) else loss_of
    chosen = torch.arange(min(HELDOUT_ROWS, len(rows))).numpy()
    mine = chosen[rank.rank :: rank.world]
    total = module(rows.batch(mine).to(rank.device)) if len(mine) else torch.zeros((), device=rank.device)
    loss_of.train()
    return summed(total, rank).item() / int(rows.trained_tokens[chosen].sum())


def summed(value: torch.Tensor, rank: Rank) -> torch.Tensor:
    """A scalar summed over the ranks."""
    value = value.detach().clone()
    if rank.world > 1:
        distributed.all_reduce(value)
    return value


def save(causal: Any, tokenizer: Any, directory: Path) -> None:
    """Write model and tokenizer in Hugging Face format (safetensors)."""
    causal.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
