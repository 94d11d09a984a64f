"""N-grams, overlap with held-out rows, and near-duplicates."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.preprocess.words import Grams, WordHashes, near_duplicates, ngrams, row_ngrams, signatures

RNG = random.Random(1)
VOCABULARY = [f"word{number}" for number in range(5000)]


def words(text: str) -> np.ndarray:
    return np.frombuffer(WordHashes().of(text), dtype=np.uint32)


def sentence(length: int) -> list[str]:
    return RNG.choices(VOCABULARY, k=length)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 14))
def test_hashes_are_equal_exactly_for_equal_runs_of_words(numbers: list[int], size: int) -> None:
    hashes = ngrams(np.array(numbers, dtype=np.uint32), size)
    runs = [tuple(numbers[at : at + size]) for at in range(max(0, len(numbers) - size + 1))]
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))
    assert len({*zip(hashes.tolist(), runs, strict=True)}) == len(set(runs))


def test_case_and_punctuation_do_not_count() -> None:
    assert words("The  Train, (leaves)!").tolist() == words("the train leaves").tolist()
    assert words("the train leaves").tolist() != words("train the leaves").tolist()
    assert len(words("– … !")) == 0
    assert len(words("東京都の天気")) == 6, "in a script without spaces, each character is a word"


def test_ngrams_do_not_cross_rows() -> None:
    grams, row = row_ngrams(np.arange(10, dtype=np.uint32), np.array([4, 0, 2, 4]), 3)
    assert row.tolist() == [0, 0, 3, 3]
    assert len(set(grams.tolist())) == 4


def test_grams_are_found_among_many() -> None:
    rng = np.random.default_rng(3)
    known, others = rng.integers(0, 2**63, 1000, dtype=np.uint64), rng.integers(0, 2**63, 100_000, dtype=np.uint64)
    grams = Grams(known)
    positions, indices = grams.find(np.concatenate([others, known[:10], others]))
    assert positions.tolist() == list(range(100_000, 100_010))
    assert grams.grams[indices].tolist() == known[:10].tolist()
    assert Grams(known[:0]).find(others)[0].tolist() == []


def test_near_duplicates_of_an_earlier_row_are_found() -> None:
    rows = [sentence(60) for _ in range(300)]
    changed = [list(row) for row in rows[:20]]
    for row in changed:
        row[RNG.randrange(60)] = "changed"  # 5 of 56 shingles
    half = [[*row[:30], *sentence(30)] for row in rows[20:40]]
    texts = [words(" ".join(row)) for row in [*rows, *changed, *half]]
    signed = signatures(np.concatenate(texts), np.array([len(text) for text in texts]))
    duplicates = np.flatnonzero(near_duplicates(signed, 0.7)).tolist()
    assert duplicates == list(range(300, 320))
    assert near_duplicates(signed[:300], 0.7).sum() == 0


def test_one_of_many_equal_rows_is_kept() -> None:
    row = sentence(40)
    texts = [words(" ".join(row)) for _ in range(500)]
    signed = signatures(np.concatenate(texts), np.full(500, 40))
    assert np.flatnonzero(~near_duplicates(signed, 0.8)).tolist() == [0]
