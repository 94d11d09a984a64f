"""Intervals compared with scipy's, and the sample size compared with simulation."""

import numpy as np
import pytest
from scipy import stats

from tasks.evaluate.statistics import (
    RESAMPLES,
    bootstrap_interval,
    holm_rejections,
    non_inferiority_sample_size,
    score_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "items"), [(0, 1), (1, 1), (0, 500), (500, 500), (457, 512), (3, 64)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.995])
def test_wilson_equals_scipy(right: int, items: int, confidence: float) -> None:
    found = wilson_interval(right, items, confidence)
    for side, bound in (("greater", found.low), ("less", found.high)):
        theirs = stats.binomtest(right, items, alternative=side).proportion_ci(confidence, method="wilson")
        assert bound == pytest.approx(theirs.low if side == "greater" else theirs.high, abs=1e-12)


@pytest.mark.parametrize("kind", ["paired outcomes", "shares", "few"])
def test_bootstrap_equals_scipy(kind: str) -> None:
    draw = np.random.default_rng(1)
    values = {
        "paired outcomes": draw.choice([-1.0, 0.0, 1.0], 500, p=[0.04, 0.93, 0.03]),
        "shares": draw.beta(2, 5, 300),
        "few": np.array([0.0, 0.0, 1.0, 0.5, 0.25]),
    }[kind]
    found = bootstrap_interval(values, 0.95)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=100_000, confidence_level=0.9, method="percentile", rng=draw
    ).confidence_interval
    # Quantiles of RESAMPLES draws and of ten times as many differ by a few of their standard errors.
    step = 4 * values.std() / np.sqrt(len(values)) / np.sqrt(RESAMPLES) * 2.1 + 1 / len(values) * (kind != "shares")
    assert found.low == pytest.approx(theirs.low, abs=step)
    assert found.high == pytest.approx(theirs.high, abs=step)
    assert found.estimate == values.mean()


def test_bounds_are_reproducible() -> None:
    values = np.random.default_rng(2).normal(size=200)
    assert bootstrap_interval(values, 0.95) == bootstrap_interval(values.copy(), 0.95)


def test_equal_values_are_not_certain() -> None:
    found = bootstrap_interval(np.zeros(59), 0.95)
    assert found.estimate == 0
    assert -found.low == found.high == pytest.approx(0.05, abs=1e-3)  # 0.95 ** 59 = 0.0485
    assert bootstrap_interval(np.ones(1), 0.95).low == pytest.approx(0.05)


def test_fractional_scores_use_the_bootstrap_and_binary_ones_wilson_interval() -> None:
    outcomes = np.array([1.0] * 90 + [0.0] * 10)
    assert score_interval(outcomes) == wilson_interval(90, 100, 0.95)
    shares = np.append(outcomes, 0.5)
    assert score_interval(shares) == bootstrap_interval(shares, 0.95)


@pytest.mark.usefixtures("cached_resampling")
@pytest.mark.parametrize(("losses", "gains"), [(0.03, 0.03), (0.09, 0.09)])
def test_the_sample_size_has_the_stated_power(losses: float, gains: float) -> None:
    """With that many items, equally good models are shown to be non-inferior as often as the power says."""
    margin, power, trials = 0.04, 0.9, 1000
    items = non_inferiority_sample_size(np.sqrt(losses + gains), margin, power=power)
    draw = np.random.default_rng(3)
    outcomes = [-1.0, 0.0, 1.0]
    shown = sum(
        bootstrap_interval(draw.choice(outcomes, items, p=[losses, 1 - losses - gains, gains]), 0.95).low > -margin
        for _ in range(trials)
    )
    print(f"{items} items: {shown / trials:.3f} of equally good models are shown to be non-inferior")
    assert shown / trials == pytest.approx(power, abs=0.035)


def test_holm() -> None:
    assert holm_rejections([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm_rejections([], 0.05) == []
    assert holm_rejections([0.5], 0.05) == [False]
