"""Hashes of the words of rows: to find training rows that overlap held-out rows, or one another."""

import re
import sys
from array import array
from zlib import crc32

import numpy as np
import rensa

from tasks.preprocess.secrets import SHORTEST, suspect

# Scripts without spaces: each character is a word.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_MULTIPLIER, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)
OVERLAP = 13  # words: https://arxiv.org/abs/2005.14165, appendix C
COMMON = 10  # an n-gram in more training documents than this is boilerplate, not an overlap (same source)
SHINGLE, PERMUTATIONS, BAND = 5, 128, 4  # MinHash: words per shingle, hashes per signature and per band
MAX_COMPARED = 64  # rows per band value, so that many similar rows do not take quadratic time
TABLE_BITS = 27
WORD = 1 << 30  # the bit that is set in a word's hash and in no token


class WordHashes:
    """Hashes words (to 30 bits of a uint32, with the bit WORD set), ignoring case and punctuation.

    `suspects` counts the words so far that could be part of a credential.
    """

    def __init__(self) -> None:
        self.suspects = 0

    def of(self, text: str) -> bytes:
        """The hashes of a text's words, in order, as bytes. In scripts without spaces each character is a word."""
        if text.isalpha() and text.isascii() and len(text) < SHORTEST:  # the common case
            self.suspects += suspect(text)
            return (crc32(text.lower().encode()) % WORD | WORD).to_bytes(4, sys.byteorder)
        hashes = array("I")
        for word in text.split():
            self.suspects += suspect(word)
            plain = "".join(filter(str.isalnum, word.lower()))
            if plain:
                parts = [plain] if plain.isascii() or not _UNSPACED.search(plain) else plain
                hashes.extend(crc32(part.encode("utf-8", "replace")) % WORD | WORD for part in parts)
        return hashes.tobytes()


def ngrams(words: np.ndarray, size: int) -> np.ndarray:
    """Hash of each run of `size` words: uint64 [len(words) - size + 1], from uint32 [len(words)]."""
    power, reach = words.astype(np.uint64), 1  # hashes of runs of `reach` words, a power of two
    result, width = power[:0], 0
    while reach <= size:
        if size & reach:
            result = _joined(result, power[width:]) if width else power
            width += reach
        power = _joined(power, power[reach:])
        reach *= 2
    return result


def _joined(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    shorter = min(len(left), len(right))
    mixed = left[:shorter] * _MULTIPLIER + right[:shorter]
    return mixed ^ (mixed >> _SHIFT)


def row_ngrams(words: np.ndarray, counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """N-grams that do not cross rows, and the row of each; `counts` is the number of words in each row."""
    grams = ngrams(words, size)
    row = np.repeat(np.arange(len(counts)), counts)
    inside = row[: len(grams)] == row[len(words) - len(grams) :]
    return grams[inside], row[: len(grams)][inside]


class Grams:
    """A set of n-grams with fast bulk look-up. Sorts the given array in place, since it may be large."""

    def __init__(self, grams: np.ndarray) -> None:
        grams.sort()
        new = np.ones(len(grams), dtype=bool)
        new[1:] = grams[1:] != grams[:-1]
        self.grams = grams[new]
        self._table = np.zeros(1 << (TABLE_BITS - 3), dtype=np.uint8)
        for at in range(0, len(self.grams), 1 << 20):
            places, bits = _place(self.grams[at : at + (1 << 20)])
            np.bitwise_or.at(self._table, places, bits)

    def find(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams that are in the set: their positions in the argument, and their indices in `self.grams`."""
        places, bits = _place(grams)
        likely = np.flatnonzero(self._table[places] & bits)
        index = np.searchsorted(self.grams, grams[likely])
        index[index == len(self.grams)] = 0
        equal = self.grams[index] == grams[likely] if len(self.grams) else np.zeros(0, dtype=bool)
        return likely[equal], index[equal]


def _place(grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Byte and bit of each n-gram in a table of 2**TABLE_BITS bits."""
    number = grams >> np.uint64(64 - TABLE_BITS)
    return number >> np.uint64(3), (np.uint8(1) << (number & np.uint64(7)).astype(np.uint8))


def signatures(words: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """MinHash signatures of rows' word shingles: uint32 [rows, PERMUTATIONS]. https://en.wikipedia.org/wiki/MinHash"""
    shingles, row = row_ngrams(words, counts, SHINGLE)
    offsets = np.searchsorted(row, np.arange(len(counts) + 1)).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, PERMUTATIONS, 20)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(counts), PERMUTATIONS)


def near_duplicates(signed: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows are near-duplicates of an earlier row that is kept: bool [rows], from signatures in order.

    Rows that share a band of their signatures are compared; the share of equal hashes estimates the Jaccard index.
    """
    bands = np.ascontiguousarray(signed).view(np.uint64).reshape(len(signed), PERMUTATIONS // BAND, BAND // 2)
    likely = np.zeros(len(signed), dtype=bool)
    keys = np.empty(bands.shape[:2], dtype=np.uint64)
    for band in range(bands.shape[1]):
        keys[:, band] = _joined(*bands[:, band].T)
        _, place, times = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        likely |= times[place] > 1
    duplicate = np.zeros(len(signed), dtype=bool)
    kept: dict[tuple[int, int], list[int]] = {}
    for row in np.flatnonzero(likely).tolist():
        buckets = [kept.setdefault(key, []) for key in enumerate(keys[row].tolist())]
        near = np.array(sorted({other for bucket in buckets for other in bucket}), dtype=np.int64)
        if len(near) and (signed[near] == signed[row]).mean(axis=1).max() >= threshold:
            duplicate[row] = True
            continue
        for bucket in buckets:
            if len(bucket) < MAX_COMPARED:
                bucket.append(row)
    return duplicate
