"""The statistics of the gate. All bounds are one-sided: the truth lies beyond a 95 % bound in one of 20 cases."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95  # of each bound
RESAMPLES = 10_000
SEED = 20
_CELLS = 4_000_000  # random numbers drawn together


@dataclass(frozen=True)
class Interval:
    """An estimate and its lower and upper bound."""

    estimate: float
    low: float
    high: float


def wilson_interval(successes: float, items: int, confidence: float) -> Interval:
    """Wilson's score interval of a proportion, for at least one item.

    https://doi.org/10.1080/01621459.1927.10502953
    """
    z = NormalDist().inv_cdf(confidence)
    share = successes / items
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def resampled_means(values: np.ndarray) -> np.ndarray:
    """The means of RESAMPLES bootstrap samples of `values`, sorted. The seed is fixed, so they are reproducible.

    The counts of the distinct values are drawn from a multinomial, so the cost depends on their number.
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


def bootstrap_interval(values: np.ndarray, confidence: float, means: np.ndarray | None = None) -> Interval:
    """The percentile bootstrap interval of a mean (Efron & Tibshirani 1993, chapter 13).

    If all values are equal, the bootstrap would claim certainty. In that case the bounds follow from a weaker
    statement: at this confidence, less than a share 1 - (1 - confidence) ^ (1 / items) of the population differs, and
    by 1 at most.
    """
    mean = float(values.mean())
    if values.min() == values.max():
        half = 1 - (1 - confidence) ** (1 / len(values))
        return Interval(mean, mean - half, mean + half)
    means = resampled_means(values) if means is None else means
    low, high = np.quantile(means, [1 - confidence, confidence])
    return Interval(mean, float(low), float(high))


def score_interval(score: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """A mean score with its bounds: Wilson's if every item is right or wrong, else the bootstrap's."""
    if np.isin(score, (0.0, 1.0)).all():
        return wilson_interval(float(score.sum()), len(score), confidence)
    return bootstrap_interval(score, confidence)


def non_inferiority_sample_size(
    deviation: float, margin: float, confidence: float = CONFIDENCE, power: float = 0.9
) -> int:
    """Items needed to show non-inferiority within `margin`, with probability `power`, if the models are equally good.

    `deviation` is the standard deviation of the paired differences. Uses the normal approximation of the one-sided
    test (https://doi.org/10.1002/sim.4780010204). For a difference in means, pass the margin plus that difference; to
    show superiority, pass the difference alone.
    """
    z = NormalDist()
    return math.ceil((deviation * (z.inv_cdf(confidence) + z.inv_cdf(power)) / margin) ** 2)


def holm_rejections(p_values: list[float], level: float) -> list[bool]:
    """Which null hypotheses Holm's step-down method rejects at a family-wise error rate of `level`.

    https://www.jstor.org/stable/4615733
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = [False] * len(p_values)
    for rank, at in enumerate(order):
        if p_values[at] > level / (len(order) - rank):
            break
        rejected[at] = True
    return rejected
