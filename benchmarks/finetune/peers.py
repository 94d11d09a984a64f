"""What the sides of TRL and Hugging Face share: the settings of Forge's training, and the timing of steps."""

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from benchmarks.finetune.shapes import BETAS, CLIP, SEED, WARMUP, WEIGHT_DECAY, Shape


def training_arguments(shape: Shape, precision: str, steps: int, batch: int, per_step: int) -> dict[str, Any]:
    """Arguments of TrainingArguments for steps of `per_step` rows or documents in micro batches of `batch`."""
    cuda = torch.cuda.is_available()
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": per_step // batch,
        "learning_rate": shape.learning_rate,
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "max_grad_norm": CLIP,
        "optim": "adamw_torch_fused",
        "bf16": precision == "bf16",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": False,  # all activations fit
        "seed": SEED,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def attention() -> str:
    """The fastest available attention: FlashAttention 2 if it is installed and there is a GPU."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


def weights_dtype(shape: Shape) -> torch.dtype:
    """The dtype of the weights: bf16 for a frozen base, fp32 (under autocast) for trained weights."""
    return torch.bfloat16 if shape.lora else torch.float32


def train_timed(trainer: Trainer, steps: int, started: float) -> dict[str, Any]:
    """Train; returns, for each step, the seconds since the start of the first and the tokens up to its end.

    `started` is the Unix time at which loading the model began; the time to the first step counts from there, as in
    Forge. Tokens are counted before the collator pads them, so that no tensor has to be read. The schedule is Forge's:
    the trainers' own lags by a step and would spend the first step at a learning rate of zero.
    """
    counts: deque[int] = deque()  # of batches collated and not yet trained on
    collate: Any = trainer.data_collator
    train_on = trainer.training_step
    clock = Clock()

    def counting_collate(rows: list[dict[str, Any]]) -> Any:
        counts.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    def counting_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        clock.tokens += counts.popleft()
        return train_on(*args, **kwargs)

    trainer.data_collator = counting_collate
    trainer.training_step = counting_step
    trainer.add_callback(clock)
    trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), warmup_cosine(steps))
    trainer.train()
    return {
        "steps": [[step, tokens, at - clock.started] for step, tokens, at in clock.ends],
        "seconds_to_first_step": clock.ends[0][2] - started,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


class Clock(TrainerCallback):
    """Records the end of each step."""

    def __init__(self) -> None:
        self.started, self.tokens = 0.0, 0
        self.ends: list[tuple[int, int, float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record a step once the GPU has finished it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((state.global_step, self.tokens, time.time()))


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """Forge's factor of the learning rate, by step from 0."""
    warmup = max(1, round(steps * WARMUP))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def save_model(trainer: Trainer, out: str) -> None:
    """Save the trained weights or adapter as safetensors."""
    Path(out).mkdir(parents=True)
    trainer.save_model(out)
