"""Packing keeps every document, never overfills a row, and leaves little padding."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.preprocess import pack
from tasks.preprocess.pack import best_fit_decreasing, write_packed
from tasks.preprocess.tokens import TRAINED
from tasks.preprocess.worker import DOCUMENT


@given(st.lists(st.integers(1, 64), max_size=300))
def test_every_document_is_in_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    row_of, rows = best_fit_decreasing(lengths, 64)
    used = np.bincount(row_of, weights=lengths, minlength=rows) if lengths else np.zeros(0)
    assert len(row_of) == len(lengths)
    assert len(used) == rows
    assert ((used > 0) & (used <= 64)).all()
    # No two rows could be merged: best fit opens a row only if no other has enough space.
    assert (64 - used >= 32).sum() <= 1


def test_long_tailed_lengths_pack_nearly_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 20_000).astype(int), 1, 512)
    _, rows = best_fit_decreasing(lengths.tolist(), 512)
    assert lengths.sum() / (rows * 512) > 0.995


@pytest.mark.parametrize("shard_tokens", [64, 100, 1 << 20])
def test_shards_hold_every_document(shard_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "SHARD_TOKENS", shard_tokens)
    rng = np.random.default_rng(1)
    contents = [rng.integers(1, 1000, rng.integers(2, 16), dtype=np.uint32) for _ in range(60)]
    for content in contents:
        content[1:] |= TRAINED
    documents = np.zeros(60, dtype=DOCUMENT)
    for spill, start in ((0, 0), (1, 30)):  # the files of two processes
        part = contents[start : start + 30]
        (tmp_path / str(spill)).write_bytes(b"".join(content.tobytes() for content in part))
        sizes = np.array([4 * len(content) for content in part])
        documents["spill"][start : start + 30] = spill
        documents["tokens_at"][start : start + 30] = np.cumsum(sizes) - sizes
    documents["length"] = [len(content) for content in contents]
    rows = write_packed(documents, [tmp_path / "0", tmp_path / "1"], 16, tmp_path / "packed")

    actual = []
    shards = sorted((tmp_path / "packed").iterdir())
    assert len(shards) == -(-rows // max(1, shard_tokens // 16))
    for shard in shards:
        tokens, trained, number = (np.load(shard / f"{name}.npy") for name in ("tokens", "trained", "document"))
        assert (tokens.dtype, trained.dtype, number.dtype) == (np.uint32, np.bool_, np.uint16)
        assert not tokens[number == 0].any()
        assert not trained[number == 0].any()
        for row in range(len(tokens)):
            assert (np.diff(number[row].astype(int))[: np.count_nonzero(number[row]) - 1] >= 0).all()
            for document in range(1, number[row].max() + 1):
                here = number[row] == document
                actual.append((tokens[row][here].tolist(), trained[row][here].tolist()))
    expected = [((content & ~TRAINED).tolist(), (content >= TRAINED).tolist()) for content in contents]
    assert sorted(actual) == sorted(expected)


def test_truncated_token_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"\0" * 12)
    documents = np.zeros(1, dtype=DOCUMENT)
    documents["length"] = 4
    with pytest.raises(OSError, match="tokens are incomplete"):
        write_packed(documents, [tmp_path / "0"], 16, tmp_path / "packed")
