"""Fixtures of the evaluation's tests."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest

from tasks.evaluate import gate, statistics


@pytest.fixture(scope="module")
def cached_resampling() -> Iterator[None]:
    """Resample each multiset of values once: simulations draw the same few multisets again and again."""
    resampled: dict[bytes, np.ndarray] = {}
    resample = statistics.resampled_means

    def resampled_means(values: np.ndarray) -> np.ndarray:
        key = np.sort(values).tobytes()
        if key not in resampled:
            resampled[key] = resample(values)
        return resampled[key]

    with (
        mock.patch.object(gate, "resampled_means", resampled_means),
        mock.patch.object(statistics, "resampled_means", resampled_means),
    ):
        yield
