"""The learning rate, as a function of the step alone."""

import math
from typing import Literal

DECAY = 0.2  # the share of the steps in which wsd decays


def share(kind: Literal["cosine", "linear", "wsd"], step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the learning rate at a step (from 0): linear warm-up, then a fall to zero.

    cosine: https://arxiv.org/abs/1608.03983; wsd (warm-up, stable, decay): https://arxiv.org/abs/2404.06395
    """
    warmup = max(1, round(steps * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * passed))
    if kind == "linear":
        return 1 - passed
    return min(1.0, (steps - step) / max(1, round(DECAY * steps)))
