"""Packing loses nothing, overfills nothing, and fills rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.preprocess.pack import best_fit_decreasing


@given(st.lists(st.integers(1, 64), max_size=300))
def test_every_document_is_in_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    rows = best_fit_decreasing(lengths, 64)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in row) <= 64 for row in rows)
    # No two rows could be one: best fit opens a row only where none has room.
    free = sorted(64 - sum(lengths[document] for document in row) for row in rows)
    assert sum(space >= 32 for space in free) <= 1


def test_a_long_tail_is_packed_nearly_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 20_000).astype(int), 1, 512)
    rows = best_fit_decreasing([int(length) for length in lengths], 512)
    assert lengths.sum() / (len(rows) * 512) > 0.995
