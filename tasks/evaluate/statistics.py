"""Intervals that the gate decides by. Every one is one-sided: a 95 % bound is passed by chance in one of 20 cases."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95  # of each bound, unless told
RESAMPLES = 10_000
SEED = 20
_CELLS = 4_000_000  # random numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """An estimate and its lower and upper bound."""

    estimate: float
    low: float
    high: float


def wilson(successes: float, items: int, confidence: float) -> Interval:
    """Wilson's score interval of a share (https://doi.org/10.1080/01621459.1927.10502953); `items` at least 1."""
    z = NormalDist().inv_cdf(confidence)
    share = successes / items
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of RESAMPLES samples drawn from values with replacement, sorted; always the same ones for a seed.

    Equal values are drawn together, so that the cost is that of the different ones.
    """
    distinct, counts = np.unique(values, return_counts=True)
    random = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    rows = max(1, _CELLS // len(distinct))
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        drawn = random.multinomial(len(values), counts / len(values), size=size)
        means[start : start + size] = drawn @ distinct / len(values)
    means.sort()
    return means


def bootstrap(values: np.ndarray, confidence: float, means: np.ndarray | None = None) -> Interval:
    """The percentile bootstrap's interval of a mean (Efron & Tibshirani 1993, chapter 13).

    Where no two values differ, resampling would say that the mean is certain. What is certain is only that fewer than
    a share of 1 - (1 - confidence) ^ (1 / items) of all items are otherwise, by as much as 1.
    """
    mean = float(values.mean())
    if values.min() == values.max():
        doubt = 1 - (1 - confidence) ** (1 / len(values))
        return Interval(mean, mean - doubt, mean + doubt)
    means = resampled_means(values) if means is None else means
    low, high = np.quantile(means, [1 - confidence, confidence])
    return Interval(mean, float(low), float(high))


def score_interval(score: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """A mean score with its bounds: Wilson's where every item is right or wrong, else the bootstrap's."""
    if np.isin(score, (0.0, 1.0)).all():
        return wilson(float(score.sum()), len(score), confidence)
    return bootstrap(score, confidence)


def items_to_decide(deviation: float, margin: float, confidence: float = CONFIDENCE, power: float = 0.9) -> int:
    """About how many items show that a model is no worse than by `margin`, with a probability of `power`, if it is not.

    `deviation` is that of the paired differences. The normal approximation of a one-sided test
    (https://doi.org/10.1002/sim.4780010204).
    """
    z = NormalDist()
    return math.ceil((deviation * (z.inv_cdf(confidence) + z.inv_cdf(power)) / margin) ** 2)


def holm(chances: list[float], level: float) -> list[bool]:
    """Which of several findings stand, given their p-values, if any is to be false with a chance of `level` at most.

    Holm's step-down (https://www.jstor.org/stable/4615733).
    """
    order = sorted(range(len(chances)), key=chances.__getitem__)
    stands = [False] * len(chances)
    for rank, at in enumerate(order):
        if chances[at] > level / (len(order) - rank):
            break
        stands[at] = True
    return stands
