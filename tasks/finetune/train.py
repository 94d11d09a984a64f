"""The training run: one loop for any number of processes, which resumes where it was interrupted."""

import json
import logging
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

from forge.capacity.model_size import architecture_config, measure_model
from forge.capacity.training_memory import resolve_parallelism
from forge.cluster.gpus import find_gpus
from forge.core.contracts import Base
from forge.core.errors import ForgeError
from forge.core.recipe import ModelRecipe, TrainingRecipe
from forge.models.chat import load_tokenizer
from forge.registry.packages import LocalBase
from tasks.finetune.checkpoint import Checkpoints
from tasks.finetune.checkpoint_mirror import CheckpointMirror
from tasks.finetune.data import Batch, GlobalBatchSampler, PackedRows, micro_batches
from tasks.finetune.flops import flops_per_token, peak_flops
from tasks.finetune.gpu_monitor import CoolDown, gpu_temperature
from tasks.finetune.loss import TrainedTokenLoss
from tasks.finetune.model import (
    DTYPES,
    add_adapter,
    build_empty,
    build_model,
    build_quantised,
    freeze_unused,
    load_config,
    load_sharded,
)
from tasks.finetune.model_check import keeps_documents_apart
from tasks.finetune.oom import explain_oom
from tasks.finetune.parallel import adapt_to_world_size, all_reduce_sum, parallelize, sync_gradients
from tasks.finetune.process_group import Rank, Stopped
from tasks.finetune.progress_bar import TrainingProgress
from tasks.finetune.schedule import lr_factor
from tasks.finetune.telemetry import Telemetry
from tasks.finetune.train_state import TrainState

log = logging.getLogger(__name__)

transformers_logging.disable_progress_bar()
POINTS = 100  # of the loss curve
HELDOUT_POINTS = 10
HELDOUT_ROWS = 64  # of the held-out rows, for the curve; evaluation scores the rest
WARM_UP_STEPS = 3  # left out of the speed: kernels are selected and layers compiled in them
NORMS, EXPLODED = 32, 100  # skip a step whose gradient norm exceeds EXPLODED times the median of the last NORMS


@dataclass(frozen=True)
class TrainingJob:
    """A data set's directory, the base model, and how to train it."""

    data: Path
    base: LocalBase
    model: ModelRecipe
    training: TrainingRecipe
    checkpoints: Path  # a directory of this job alone that all ranks see
    mirror: CheckpointMirror | None = None  # copies the checkpoints to a bucket
    origin: Base = field(default_factory=Base)  # the name of `base` on all machines


class Trainer:
    """A job's model, optimizer and data on one rank."""

    def __init__(self, rank: Rank, job: TrainingJob) -> None:
        self.started = time.monotonic()
        self.rank, self.job = rank, job
        self.recipe = adapt_to_world_size(job.training, rank.world_size)
        self._open_data()
        self._build_model()
        self.packed = self._isolates_documents()
        self.optimizer = self._build_optimizer()
        self._cool_down = CoolDown(partial(gpu_temperature, rank.device), self.recipe.gpu_temperature_limit, rank.rank)
        self.checkpoints = Checkpoints(job.checkpoints, rank, self.recipe.keep_checkpoints, job.mirror)
        self.state = TrainState(**(self.checkpoints.load(self.model, self.optimizer) or {}))
        self.seconds_to_first_step = 0.0
        self._saved_at = 0.0
        self._first_step = self.state.step  # of this process
        self._warm: tuple[int, float] | None = None  # tokens and seconds at the end of the warm-up steps

    def _open_data(self) -> None:
        data, recipe = self.job.data, self.recipe
        card = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
        self.context: int = card["context"]
        self.end_tokens: list[str] = card.get("end_tokens", [])
        self.tokenizer = load_tokenizer(LocalBase(str(data / "tokenizer")))
        self.rows, self.heldout = PackedRows(data / "train"), PackedRows(data / "heldout")
        self.sampler = GlobalBatchSampler(len(self.rows), recipe.global_batch_size, recipe.epochs, recipe.seed)

    def _build_model(self) -> None:
        """Build the model with its adapter and loss, distributed over the ranks."""
        job, recipe, device = self.job, self.recipe, self.rank.device
        self._choose_parallelism()
        self._explained_oom = partial(explain_oom, self._size, recipe, self.context, self._parallelism)
        sharded = self._parallelism in ("fsdp", "hybrid")
        # A model that will be sharded may be too large for one GPU.
        empty = sharded and bool(job.base.location) and recipe.method != "qlora"
        dtype = DTYPES[recipe.precision] if recipe.lora else torch.float32
        if recipe.method == "qlora":
            self.model = build_quantised(job.base, dtype, torch.device("cpu") if sharded else device)
        elif empty:
            self.model = build_empty(job.base, dtype)
        else:
            model = build_model(job.model, job.base, self.tokenizer, self.context, recipe.seed, dtype)
            self.model = model.to(device)
        freeze_unused(self.model)
        self.adapter = add_adapter(self.model, recipe.lora, recipe.seed) if recipe.lora else None
        self.parameters = self.model.num_parameters()
        self._flops_per_token = self._count_flops()
        self._model_loss = TrainedTokenLoss(self.model)
        self.loss = parallelize(self._model_loss, recipe, self.rank, self._parallelism)
        if empty:
            load_sharded(self.model, job.base, device)
        autocast = recipe.precision == "bf16" and not sharded  # FSDP casts by itself
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=autocast)

    def _choose_parallelism(self) -> None:
        job, cuda = self.job, self.rank.device.type == "cuda"
        architecture = job.model.architecture
        config = architecture_config(architecture, self.context) if architecture else load_config(job.base).to_dict()
        smallest_gpu = min(find_gpus(), key=lambda gpu: gpu.memory, default=None) if cuda else None
        self._size = measure_model(config)
        self._parallelism = resolve_parallelism(self._size, self.recipe, self.context, smallest_gpu)

    def _isolates_documents(self) -> bool:
        """Whether the model can read packed rows; the same on all ranks."""
        rank, recipe = self.rank, self.recipe
        row = torch.from_numpy(np.resize(self.rows.tokens_of(0), self.context))  # repeated, if it is not full
        tokens = row.expand(recipe.micro_batch_size or 1, -1).to(rank.device)
        with self._explained_oom(), self.autocast:
            apart = keeps_documents_apart(self.loss, self._model_loss, tokens, recipe.precision)
        isolates = all_reduce_sum(torch.tensor(float(apart), device=rank.device), rank).item() == rank.world_size
        if rank.first and not isolates:
            log.warning(
                "%s reads across documents in a packed row, so each is trained in a row of its own, which is slower",
                type(self.model).__name__,
            )
        if recipe.compile and not isolates:
            torch.compiler.set_stance("force_eager")  # batches of documents have ever other shapes
        return isolates

    def _count_flops(self) -> float:
        size = self.model.config.get_text_config()
        trained = self.model.num_parameters(only_trainable=True, exclude_embeddings=True)
        frozen = self.model.num_parameters(exclude_embeddings=True) - trained
        return flops_per_token(trained, frozen, size.num_hidden_layers, size.hidden_size, self.context)

    def _build_optimizer(self) -> torch.optim.AdamW:
        """AdamW, with weight decay for matrices but not for biases and norms."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(
            [
                {
                    "params": [parameter for parameter in trained if parameter.ndim >= 2],
                    "weight_decay": self.recipe.weight_decay,
                },
                {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
            ],
            lr=self.recipe.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def train(self, telemetry: Telemetry | None = None) -> None:
        """Take all remaining steps. Afterwards the model has its final weights or, with early stopping, its best ones.

        The first rank also sends the points of the loss curve to `telemetry`.

        Raises Stopped after a signal, ForgeError if training cannot continue.
        """
        state, steps = self.state, self.sampler.steps
        if self.rank.first:
            log.info(self._banner())
            self._warn_of_few_rows()
        self.loss.train()
        self._saved_at = time.monotonic()
        with TrainingProgress(steps, state, self.rank.first) as progress, self._explained_oom():
            while state.step < steps and not self._stops_early():
                self.rank.heartbeat()
                stop, save = self._timed_step()
                improved = False
                if self._is_point(POINTS):
                    improved = self._add_point()
                    progress.update(state)
                    if telemetry:
                        telemetry.log(state.step, self.metrics())
                    self._cool_down()
                self._checkpoint(stop or save or improved)
                if stop and state.step < steps:
                    self.checkpoints.settle()
                    raise Stopped(
                        f"training stopped after step {state.step:,} of {steps:,} and saved its state",
                        fix="the same command resumes it",
                    )
        self.checkpoints.wait()  # no rank leaves while another still needs it to save
        if self.recipe.early_stopping_patience and state.best_step not in (None, state.step):
            self.checkpoints.load(self.model, self.optimizer, state.best_step)

    def train_step(self, step: int) -> tuple[bool, bool]:
        """Take an optimizer step, or skip it if its loss or gradient is not finite or explodes.

        Returns whether a signal stops any rank, and whether a checkpoint is due; the same on all ranks.
        """
        rows = self.sampler.rows_of(step)
        trained = int(self.rows.trained_tokens[rows].sum())
        loss, stop, save = self._forward_backward(step, rows, trained)
        norm = self._clip_gradients()
        if problem := self._problem(loss, norm):
            self._skip(step, rows, problem)
        else:
            self._update(step, loss, trained, norm)
        self.optimizer.zero_grad()
        self.state.tokens += int(self.rows.all_tokens[rows].sum())
        return stop, save

    def _forward_backward(self, step: int, rows: np.ndarray, trained: int) -> tuple[float, bool, bool]:
        """Accumulate the gradients of a global batch.

        Returns its loss summed over all ranks (nats), and what `train_step` returns.
        """
        rank = self.rank
        torch.manual_seed(hash((self.recipe.seed, step, rank.rank)))  # for dropout
        total = torch.zeros((), device=rank.device)
        for batch, last in self._batches(self.rows, rows):
            sync_gradients(self.loss, last)
            with self.autocast:
                loss = self.loss(batch)
            # Every trained token of the global batch has the same weight. Gradients are averaged over the ranks, which
            # the factor world_size undoes.
            (loss * (rank.world_size / trained)).backward()
            total += loss.detach()
        stop, save = rank.stop.is_set(), rank.first and self._checkpoint_is_due()
        sums = torch.stack([total, total.new_tensor(stop), total.new_tensor(save)])
        loss_sum, stops, saves = all_reduce_sum(sums, rank).tolist()
        return loss_sum, stops > 0, saves > 0

    def _batches(self, data: PackedRows, rows: np.ndarray) -> Iterator[tuple[Batch, bool]]:
        """This rank's share of rows, one forward pass at a time, and whether it is the last one."""
        rank, share = self.rank, self.recipe.global_batch_size // self.rank.world_size
        tokens = (self.recipe.micro_batch_size or share) * self.context
        parts = list(micro_batches(data.spans(rows, self.packed), tokens, rank.rank, rank.world_size))
        for number, (spans, takes_part) in enumerate(parts, 1):
            batch = data.batch(spans)
            yield (batch if takes_part else batch.untrained()).to(rank.device), number == len(parts)

    def _clip_gradients(self) -> float:
        """Clip the gradients to max_grad_norm; returns their norm before that."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _problem(self, loss: float, norm: float) -> str:
        """Why a step must be skipped, or "". The same on all ranks."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        norms = self.state.norms
        if len(norms) == NORMS and norm > EXPLODED * statistics.median(norms):
            return f"the gradient explodes (norm {norm:.3g}, after a median of {statistics.median(norms):.3g})"
        return ""

    def _skip(self, step: int, rows: np.ndarray, problem: str) -> None:
        skipped = self.state.skipped
        skipped.append(step + 1)
        if len(skipped) > self.recipe.max_skipped_steps:
            raise ForgeError(
                problem,
                where=f"step {step + 1}",
                fix=f"lower training.learning_rate (it is {self.recipe.learning_rate}) or check the packed rows "
                f"{', '.join(map(str, sorted(rows)))} of {self.job.data / 'train'}; {len(skipped)} steps were skipped",
            )

    def _update(self, step: int, loss: float, trained: int, norm: float) -> None:
        state, recipe = self.state, self.recipe
        state.norms = [*state.norms, norm][-NORMS:]
        state.loss, state.trained = state.loss + loss, state.trained + trained
        factor = lr_factor(recipe.lr_scheduler, step, self.sampler.steps, recipe.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * factor
        self.optimizer.step()

    def _timed_step(self) -> tuple[bool, bool]:
        """Take a step and keep count of steps and time."""
        state = self.state
        started = time.monotonic()
        stop, save = self.train_step(state.step)
        state.step += 1
        state.seconds += time.monotonic() - started
        taken = state.step - self._first_step
        if taken == 1:
            self.seconds_to_first_step = time.monotonic() - self.started
        if taken == min(WARM_UP_STEPS, self.sampler.steps - self._first_step - 1):
            self._warm = state.tokens, state.seconds
        return stop, save

    def _stops_early(self) -> bool:
        patience = self.recipe.early_stopping_patience
        return patience is not None and self.state.worse >= patience

    def _checkpoint_is_due(self) -> bool:
        return time.monotonic() - self._saved_at > 60 * self.recipe.checkpoint_minutes

    def _checkpoint(self, now: bool) -> None:
        """Start to save if it is time for a checkpoint."""
        steps = self.recipe.checkpoint_steps
        self.checkpoints.poll()
        if now or (steps and self.state.step % steps == 0):
            self.checkpoints.save(self.model, self.optimizer, asdict(self.state))
            self._saved_at = time.monotonic()

    def _is_point(self, points: int) -> bool:
        """Whether this step is one of that many evenly spaced ones, or the last one."""
        every = max(1, self.sampler.steps // POINTS) * max(1, POINTS // points)
        return self.state.step % every == 0 or self.state.step == self.sampler.steps

    def _add_point(self) -> bool:
        """Add a point to the loss curve; returns whether early stopping should keep this step's weights."""
        state = self.state
        if not state.trained:  # all of its steps were skipped
            return False
        point: dict[str, float] = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3)}
        point["loss"] = state.loss / state.trained
        state.loss, state.trained = 0.0, 0
        state.curve.append(point)
        if not self._is_point(HELDOUT_POINTS):
            return False
        point["heldout_loss"] = heldout = self.heldout_loss()
        improved = heldout < state.best_loss
        state.worse = 0 if improved else state.worse + 1
        if improved:
            state.best_loss = heldout
        if improved and self.recipe.early_stopping_patience:  # without it, no checkpoint of this step is kept
            state.best_step = state.step
            return True
        return False

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss (nats per trained token) on the first HELDOUT_ROWS held-out rows, divided among the ranks."""
        rank = self.rank
        self.loss.eval()
        rows = np.arange(min(HELDOUT_ROWS, len(self.heldout)))
        total = torch.zeros((), device=rank.device)
        for batch, _ in self._batches(self.heldout, rows):
            with self.autocast:
                total += self.loss(batch)
        self.loss.train()
        return all_reduce_sum(total, rank).item() / int(self.heldout.trained_tokens[rows].sum())

    def metrics(self) -> dict[str, float]:
        """The latest values of the metrics in telemetry.METRICS that training knows."""
        point = self.state.curve[-1]
        cuda = self.rank.device.type == "cuda"
        return {name: point[name] for name in ("loss", "heldout_loss") if name in point} | {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": self.state.norms[-1],
            "tokens_per_second": self.tokens_per_second(),
            "skipped_steps": len(self.state.skipped),
            "memory_bytes": torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss,
        }

    def flops(self) -> tuple[float, float]:
        """Floating-point operations per token, and the peak of all processes per second."""
        peak = peak_flops(self.rank.device, DTYPES[self.recipe.precision])
        return self._flops_per_token, peak * self.rank.world_size

    def tokens_per_second(self) -> float:
        """Speed of all processes, without padding and without the warm-up steps."""
        tokens, seconds = self._warm or (0, 0.0)
        return (self.state.tokens - tokens) / max(self.state.seconds - seconds, 1e-9)

    def _banner(self) -> str:
        world_size, step = self.rank.world_size, self.state.step
        return (
            f"{self.parameters:,} parameters, {self.sampler.steps:,} steps of {self.recipe.global_batch_size} rows, "
            f"{world_size} process{'es' * (world_size > 1)} on {self.rank.device.type}"
            + (f"; resuming after step {step:,}" if step else "")
        )

    def _warn_of_few_rows(self) -> None:
        rows, batch = len(self.rows), self.recipe.global_batch_size
        if rows < batch:
            log.warning(
                f"the data set has {rows} packed rows, fewer than training.global_batch_size ({batch}), so each step "
                f"reads a row {batch / rows:.0f} times; lower it, or data.max_seq_len, to take more steps"
            )
