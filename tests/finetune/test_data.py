"""Packed rows: positions restart with each document, and the order is a function of the seed and the step."""

import numpy as np
import pytest
import torch

from tasks.finetune.data import IGNORED, GlobalBatchSampler, PackedRows, positions

DOCUMENT = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0]])


def test_positions_restart_with_each_document() -> None:
    assert positions(DOCUMENT).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]


def test_targets_are_the_next_trained_tokens(tmp_path) -> None:
    shards = (
        ([[5, 6, 7, 8, 9, 0]], [[0, 0, 1, 0, 1, 0]], [[1, 1, 1, 2, 2, 0]]),
        ([[1, 2, 3, 4, 0, 0], [6] * 6], [[0, 1, 1, 1, 0, 0], [0] * 6], [[1, 1, 1, 1, 0, 0], [1] * 6]),
    )
    for number, (tokens, trained, document) in enumerate(shards):
        shard = tmp_path / f"{number:05}"
        shard.mkdir()
        np.save(shard / "tokens.npy", np.array(tokens, dtype=np.uint32))
        np.save(shard / "trained.npy", np.array(trained, dtype=bool))
        np.save(shard / "document.npy", np.array(document, dtype=np.uint16))
    rows = PackedRows(tmp_path)
    batch = rows.batch(rows.spans(np.array([1, 0]), packed=True))
    assert batch.targets.tolist() == [[2, 3, 4, *[IGNORED] * 3], [IGNORED, 7, IGNORED, 9, IGNORED, IGNORED]]
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 0, 0]
    assert len(rows) == 3
    assert rows.trained_tokens.tolist() == [2, 3, 0]
    assert rows.all_tokens.tolist() == [5, 4, 6]


@pytest.mark.parametrize(("rows", "per_step", "epochs"), [(10, 4, 2), (7, 7, 1), (3, 8, 3), (100, 8, 0.5)])
def test_each_epoch_has_each_row_once(rows: int, per_step: int, epochs: float) -> None:
    sampler = GlobalBatchSampler(rows, per_step, epochs, seed=1)
    seen = np.concatenate([sampler.rows_of(step) for step in range(sampler.steps)])
    assert sampler.steps * per_step >= rows * epochs > (sampler.steps - 1) * per_step
    for epoch in range(len(seen) // rows):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_rows_of_a_step_do_not_depend_on_earlier_steps() -> None:
    sampler = GlobalBatchSampler(10, 4, 5, seed=1)
    forward = [sampler.rows_of(step).tolist() for step in range(sampler.steps)]
    backward = [GlobalBatchSampler(10, 4, 5, seed=1).rows_of(step).tolist() for step in reversed(range(sampler.steps))]
    assert forward == backward[::-1]
    assert forward != [GlobalBatchSampler(10, 4, 5, seed=2).rows_of(step).tolist() for step in range(sampler.steps)]
