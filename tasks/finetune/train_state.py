"""The state of a training loop beside weights and optimizer."""

import math
from dataclasses import dataclass, field


@dataclass
class TrainState:
    """What the loop knows beside weights and optimizer. All of it is saved with them."""

    step: int = 0  # steps done
    tokens: int = 0  # seen, without padding
    seconds: float = 0.0  # spent in steps
    skipped: list[int] = field(default_factory=list)  # steps
    norms: list[float] = field(default_factory=list)  # of the last gradients
    loss: float = 0.0  # summed since the curve's last point (nats)
    trained: int = 0  # tokens since then
    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None  # of the lowest held-out loss, where training may stop early
    best_loss: float = math.inf
    worse: int = 0  # held-out losses in a row that were no better
