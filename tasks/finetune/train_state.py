"""The state of a training loop, besides weights and optimizer."""

import math
from dataclasses import dataclass, field


@dataclass
class TrainState:
    """What the loop keeps between steps. All of it is saved with each checkpoint, under these names."""

    step: int = 0  # steps taken
    tokens: int = 0  # seen, without padding
    seconds: float = 0.0  # spent in steps
    skipped: list[int] = field(default_factory=list)  # steps
    norms: list[float] = field(default_factory=list)  # recent gradient norms
    loss: float = 0.0  # sum since the curve's last point (nats)
    trained: int = 0  # trained tokens since then
    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None  # step of the lowest held-out loss, with early stopping
    best_loss: float = math.inf
    worse: int = 0  # held-out losses in a row without improvement
