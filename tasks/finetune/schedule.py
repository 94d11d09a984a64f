"""The learning rate schedule, a function of the step alone."""

import math
from typing import Literal

DECAY = 0.2  # fraction of the steps in which wsd decays


def lr_factor(kind: Literal["cosine", "linear", "wsd"], step: int, steps: int, warmup_ratio: float) -> float:
    """Factor of the peak learning rate at a step (from 0): linear warm-up, then decay to zero.

    cosine: https://arxiv.org/abs/1608.03983; wsd (warm-up, stable, decay): https://arxiv.org/abs/2404.06395
    """
    warmup = max(1, round(steps * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "linear":
        return 1 - progress
    return min(1.0, (steps - step) / max(1, round(DECAY * steps)))
