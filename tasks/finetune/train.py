"""The training run: one readable loop, the same on one process or many, that goes on where it was broken off."""

import json
import logging
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from forge.capacity.model_size import architecture_config, measure_model
from forge.capacity.training_memory import resolve_parallelism
from forge.cluster.gpus import find_gpus
from forge.core.contracts import Base
from forge.core.errors import ForgeError
from forge.core.recipe import ModelRecipe, TrainingRecipe
from forge.registry.packages import LocalBase
from tasks.finetune.checkpoint import Checkpoints
from tasks.finetune.checkpoint_mirror import Bucket
from tasks.finetune.data import Order, PackedRows
from tasks.finetune.flops import flops_per_token, peak_flops
from tasks.finetune.gpu_monitor import CoolDown, gpu_temperature
from tasks.finetune.loss import TrainedTokenLoss
from tasks.finetune.model import (
    DTYPES,
    add_adapter,
    build_empty,
    build_model,
    build_quantised,
    load_config,
    load_sharded,
)
from tasks.finetune.oom import explain_oom
from tasks.finetune.parallel import parallelize, sync_gradients
from tasks.finetune.process_group import Rank, Stopped
from tasks.finetune.progress_bar import TrainingProgress
from tasks.finetune.schedule import share
from tasks.finetune.telemetry import Telemetry
from tasks.finetune.train_state import TrainState

log = logging.getLogger(__name__)

transformers_logging.disable_progress_bar()
POINTS = 100  # of the loss curve
HELDOUT_POINTS = 10
HELDOUT_ROWS = 64  # of the held-out rows, for the curve; evaluation scores the rest
WARM_STEPS = 3  # not counted in the speed: kernels are chosen and layers compiled in them
NORMS, EXPLODED = 32, 100  # a gradient norm of so many times the median of the last ones is no step to take


@dataclass(frozen=True)
class TrainingJob:
    """What to train on what: a data set's directory, where to start from, and how."""

    data: Path
    base: LocalBase
    model: ModelRecipe
    training: TrainingRecipe
    checkpoints: Path  # a directory that is this job's alone, and all ranks see
    copies: Bucket | None = None  # where they are copied to
    origin: Base = field(default_factory=Base)  # as which all machines know `base`


class Trainer:
    """A job's model, optimizer and rows, on one rank."""

    def __init__(self, rank: Rank, job: TrainingJob) -> None:
        self.started = time.monotonic()
        self.rank, self.job = rank, job
        self.recipe = recipe = for_processes(job.training, rank.world)
        self.context: int = json.loads((job.data / "dataset.json").read_text())["context"]
        self.tokenizer = AutoTokenizer.from_pretrained(job.data / "tokenizer", trust_remote_code=False)
        self.rows, self.heldout = PackedRows(job.data / "train"), PackedRows(job.data / "heldout")
        self.order = Order(len(self.rows), recipe.global_batch_size, recipe.epochs, recipe.seed)
        architecture = job.model.architecture
        config = architecture_config(architecture, self.context) if architecture else load_config(job.base).to_dict()
        gpu = min(find_gpus(), key=lambda one: one.memory, default=None) if rank.device.type == "cuda" else None
        self._size = measure_model(config)
        self._how = how = resolve_parallelism(self._size, recipe, self.context, gpu)
        sharded = how in ("fsdp", "hybrid")
        quantised = recipe.method == "qlora"
        empty = sharded and bool(job.base.location) and not quantised
        dtype = DTYPES[recipe.precision] if recipe.lora else torch.float32
        if quantised:  # where it is to be sharded, a GPU may have no room for the whole
            self.causal = build_quantised(job.base, dtype, torch.device("cpu") if sharded else rank.device)
        elif empty:
            self.causal = build_empty(job.base, dtype)
        else:
            causal = build_model(job.model, job.base, self.tokenizer, self.context, recipe.seed, dtype)
            self.causal = causal.to(rank.device)
        self.adapter = add_adapter(self.causal, recipe.lora, recipe.seed) if recipe.lora else None
        self.parameters = self.causal.num_parameters()
        size = self.causal.config.get_text_config()
        trained = self.causal.num_parameters(only_trainable=True, exclude_embeddings=True)
        frozen = self.causal.num_parameters(exclude_embeddings=True) - trained
        self._flops_per_token = flops_per_token(trained, frozen, size.num_hidden_layers, size.hidden_size, self.context)
        self._cool_down = CoolDown(partial(gpu_temperature, rank.device), recipe.gpu_temperature_limit, rank.rank)
        self.loss = parallelize(TrainedTokenLoss(self.causal), recipe, rank, how)
        if empty:
            load_sharded(self.causal, job.base, rank.device)
        adapted = [parameter for parameter in self.causal.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [one for one in adapted if one.ndim >= 2], "weight_decay": recipe.weight_decay},
                {"params": [one for one in adapted if one.ndim < 2], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.autocast = torch.autocast(
            rank.device.type, torch.bfloat16, enabled=recipe.precision == "bf16" and not sharded
        )
        self.checkpoints = Checkpoints(job.checkpoints, rank, recipe.keep_checkpoints, job.copies)
        self.facts = TrainState(**(self.checkpoints.load(self.causal, self.optimizer) or {}))
        self.seconds_to_first_step = 0.0

    def train(self, telemetry: Telemetry | None = None) -> None:
        """Take every step that is left. Afterwards the model has its final weights, or its best ones.

        The first rank's points of the loss curve go to `telemetry` too.

        Raises Stopped after a signal, ForgeError where steps cannot be taken.
        """
        facts, steps, recipe = self.facts, self.order.steps, self.recipe
        every = max(1, steps // POINTS)
        heldout_every = every * max(1, POINTS // HELDOUT_POINTS)
        if self.rank.first:
            log.info(self._beginning())
        self.loss.train()
        saved_at = time.monotonic()
        self._warm: tuple[int, float] | None = None
        first = facts.step
        explanation = explain_oom(self._size, recipe, self.context, self._how)
        with TrainingProgress(steps, facts, self.rank.first) as progress, explanation:
            while facts.step < steps and not (
                recipe.early_stopping_patience and facts.worse >= recipe.early_stopping_patience
            ):
                begun = time.monotonic()
                self.rank.alive()
                due = begun - saved_at > 60 * recipe.checkpoint_minutes
                stop, save = self.train_step(facts.step, due)
                facts.step += 1
                facts.seconds += time.monotonic() - begun
                if facts.step == first + 1:
                    self.seconds_to_first_step = time.monotonic() - self.started
                if facts.step == first + min(WARM_STEPS, steps - first - 1):
                    self._warm = facts.tokens, facts.seconds
                improved = False
                if facts.step % every == 0 or facts.step == steps:
                    improved = self._add_point(facts.step % heldout_every == 0 or facts.step == steps)
                    progress.update(facts)
                    if telemetry:
                        telemetry.log(facts.step, self.figures())
                    self._cool_down()
                self.checkpoints.poll()
                on_time = recipe.checkpoint_steps and facts.step % recipe.checkpoint_steps == 0
                if stop or save or on_time or (improved and recipe.early_stopping_patience):
                    self.checkpoints.save(self.causal, self.optimizer, asdict(facts))
                    saved_at = time.monotonic()
                if stop and facts.step < steps:
                    self.checkpoints.settle()
                    raise Stopped(
                        f"training was told to stop after step {facts.step:,} of {steps:,}; all of it is saved, "
                        "and the same command goes on from there"
                    )
        self.checkpoints.wait()  # no rank leaves while another still needs it to save
        if recipe.early_stopping_patience and facts.best_step not in (None, facts.step):
            self.checkpoints.load(self.causal, self.optimizer, facts.best_step)

    def train_step(self, step: int, due: bool) -> tuple[bool, bool]:
        """One optimizer step, or none where its loss or gradient is not to be trusted.

        Returns whether any rank was told to stop, and whether the first one finds it time to save.
        """
        rank, recipe, facts = self.rank, self.recipe, self.facts
        chosen = self.order.step(step)
        mine = chosen[rank.rank :: rank.world]
        trained = int(self.rows.trained_tokens[chosen].sum())
        at_once = recipe.micro_batch_size or len(mine)
        torch.manual_seed(hash((recipe.seed, step, rank.rank)))  # for dropout
        total = torch.zeros((), device=rank.device)
        for begin in range(0, len(mine), at_once):
            batch = self.rows.batch(mine[begin : begin + at_once]).to(rank.device)
            sync_gradients(self.loss, begin + at_once >= len(mine))
            with self.autocast:
                loss = self.loss(batch)
            # Each trained token of the global batch weighs the same; gradients are averaged over the ranks, so the
            # division by their number is undone here.
            (loss * (rank.world / trained)).backward()
            total += loss.detach()
        told = torch.stack([total, total.new_tensor(rank.stop.is_set()), total.new_tensor(rank.first and due)])
        loss_sum, stop, save = summed(told, rank).tolist()
        gradient = torch.nn.utils.clip_grad_norm_(self.causal.parameters(), recipe.max_grad_norm)
        norm = float(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)
        if problem := self._problem(loss_sum, norm):
            facts.skipped.append(step + 1)
            if len(facts.skipped) > recipe.max_skipped_steps:
                raise ForgeError(
                    f"step {step + 1}: {problem}; lower training.learning_rate (it is {recipe.learning_rate}) or look "
                    f"at the packed rows {', '.join(map(str, sorted(chosen)))} of {self.job.data / 'train'}; "
                    f"{len(facts.skipped)} steps were skipped for such reasons"
                )
        else:
            facts.norms = [*facts.norms, norm][-NORMS:]
            facts.loss, facts.trained = facts.loss + loss_sum, facts.trained + trained
            rate = recipe.learning_rate * share(recipe.lr_scheduler, step, self.order.steps, recipe.warmup_ratio)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        facts.tokens += int(self.rows.all_tokens[chosen].sum())
        return stop > 0, save > 0

    def _problem(self, loss: float, norm: float) -> str:
        """Why a step is not to be taken; empty if nothing speaks against it. The same on all ranks."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        norms = self.facts.norms
        if len(norms) == NORMS and norm > EXPLODED * statistics.median(norms):
            return f"the gradient explodes (norm {norm:.3g}, after a median of {statistics.median(norms):.3g})"
        return ""

    def _add_point(self, with_heldout: bool) -> bool:
        """A point of the curve; whether its held-out loss is the best so far."""
        facts = self.facts
        point: dict[str, float] = {"step": facts.step, "tokens": facts.tokens, "seconds": round(facts.seconds, 3)}
        if not facts.trained:  # all of its steps were skipped
            return False
        point["loss"] = facts.loss / facts.trained
        facts.loss, facts.trained = 0.0, 0
        improved = False
        if with_heldout:
            point["heldout_loss"] = heldout = self.heldout_loss()
            improved = heldout < facts.best_loss
            facts.worse = 0 if improved else facts.worse + 1
            if improved:
                facts.best_loss = heldout
                if self.recipe.early_stopping_patience:  # else it has no checkpoint
                    facts.best_step = facts.step
        facts.curve.append(point)
        return improved

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss (nats a trained token) on the first HELDOUT_ROWS held-out rows, shared out among the ranks."""
        self.loss.eval()
        chosen = torch.arange(min(HELDOUT_ROWS, len(self.heldout))).numpy()
        total = torch.zeros((), device=self.rank.device)
        at_once = self.recipe.micro_batch_size or self.recipe.global_batch_size // self.rank.world
        for begin in range(0, len(chosen), at_once * self.rank.world):  # as many forward passes on every rank
            mine = chosen[begin : begin + at_once * self.rank.world][self.rank.rank :: self.rank.world]
            batch = self.heldout.batch(mine if len(mine) else chosen[:1]).to(self.rank.device)
            with self.autocast:
                loss = self.loss(batch)
            total += loss if len(mine) else 0 * loss
        self.loss.train()
        return summed(total, self.rank).item() / int(self.heldout.trained_tokens[chosen].sum())

    def figures(self) -> dict[str, float]:
        """What is to be told of the last steps."""
        figures = {name: value for name, value in self.facts.curve[-1].items() if name in ("loss", "heldout_loss")}
        cuda = self.rank.device.type == "cuda"
        return figures | {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": self.facts.norms[-1],
            "tokens_per_second": self.tokens_per_second(),
            "skipped_steps": len(self.facts.skipped),
            "memory_bytes": torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss,
        }

    def flops(self) -> tuple[float, float]:
        """Floating-point operations of a token, and the peak of all processes in a second."""
        peak = peak_flops(self.rank.device, DTYPES[self.recipe.precision])
        return self._flops_per_token, peak * self.rank.world

    def tokens_per_second(self) -> float:
        """Speed (padding not counted), the first steps left out."""
        tokens, seconds = self._warm or (0, 0.0)
        return (self.facts.tokens - tokens) / max(self.facts.seconds - seconds, 1e-9)

    def _beginning(self) -> str:
        rank, facts = self.rank, self.facts
        return (
            f"{self.parameters:,} parameters, {self.order.steps:,} steps of "
            f"{self.recipe.global_batch_size} rows, {rank.world} process{'es' * (rank.world > 1)} on {rank.device.type}"
            + (f"; goes on after step {facts.step:,}, as saved" if facts.step else "")
        )


def for_processes(recipe: TrainingRecipe, world: int) -> TrainingRecipe:
    """The recipe with as many processes as there are; ForgeError where its rows cannot be shared out among them."""
    share, rest = divmod(recipe.global_batch_size, world)
    if rest or world % recipe.nodes:
        raise ForgeError(
            f"training.global_batch_size {recipe.global_batch_size} cannot be divided over {world} processes on "
            f"{recipe.nodes} node(s); change one of them"
        )
    at_once = recipe.micro_batch_size
    return recipe.model_copy(
        update={"nproc_per_node": world // recipe.nodes, "micro_batch_size": at_once and math.gcd(at_once, share)}
    )


def summed(value: torch.Tensor, rank: Rank) -> torch.Tensor:
    """A tensor summed over the ranks."""
    value = value.detach().clone()
    if rank.world > 1:
        distributed.all_reduce(value)
    return value
