"""Packing: put documents of any length into rows of one length, with little padding and without cutting any."""

import os
from bisect import bisect_left, insort
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from forge.core.full_disk import explain_full_disk
from tasks.preprocess.tokens import TRAINED

BYTES_PER_TOKEN = 7
SHARD_TOKENS = 4 << 20  # tokens in a shard


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> tuple[np.ndarray, int]:
    """Assign documents to rows: the longest first, each to the row that it fills best.

    Returns the row of each document (int64 [documents]) and the number of rows. No length may exceed `capacity`.
    https://en.wikipedia.org/wiki/Best-fit_bin_packing
    """
    row_of = [0] * len(lengths)
    rows = 0
    open_rows: dict[int, list[int]] = {}  # number of free tokens -> rows
    spaces: list[int] = []  # keys of open_rows, sorted
    for document in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = lengths[document]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = rows, capacity
            rows += 1
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        row_of[document] = row
        left = space - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(spaces, left)
            open_rows[left].append(row)
    return np.array(row_of, dtype=np.int64), rows


def write_packed(documents: np.ndarray, spills: Sequence[Path], context: int, directory: Path) -> int:
    """Pack documents (a table of DOCUMENT) and write the rows as memory-mappable arrays of shape [rows, context].

    Each shard, 00000 and so on, is a directory of `tokens.npy` (uint32), `trained.npy` (bool: the token is a target)
    and `document.npy` (uint16: 1, 2, ... within the row, 0 for padding). `spills` are the files of the documents'
    tokens. Returns the number of rows.
    """
    row_of, rows = best_fit_decreasing(documents["length"].tolist(), context)
    order = np.argsort(row_of, kind="stable")
    row_of = row_of[order]
    table = [documents[name][order] for name in ("length", "spill", "tokens_at")]
    rows_per_shard = max(1, SHARD_TOKENS // context)
    files = [os.open(path, os.O_RDONLY) for path in spills]

    def write(first: int) -> None:
        last = min(first + rows_per_shard, rows)
        low, high = np.searchsorted(row_of, [first, last])
        placed = [row_of[low:high] - first, *(column[low:high] for column in table)]
        _write_shard(placed, files, (last - first, context), directory / f"{first // rows_per_shard:05}")

    try:
        with (
            explain_full_disk(directory, "the packed rows", BYTES_PER_TOKEN * rows * context),
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for _ in pool.map(write, range(0, rows, rows_per_shard)):
                pass
    finally:
        for file in files:
            os.close(file)
    return rows


def _write_shard(placed: list[np.ndarray], files: list[int], shape: tuple[int, int], directory: Path) -> None:
    """Write one shard; `placed` holds each document's row, length, file and byte offset in it."""
    tokens = np.zeros(shape, dtype=np.uint32)
    number = np.zeros(shape, dtype=np.uint16)
    bytes_of = memoryview(tokens.data).cast("B")
    row_before, at, count = -1, 0, 0
    for row, length, spill, start in zip(*(column.tolist() for column in placed), strict=True):
        if row != row_before:
            row_before, at, count = row, row * shape[1], 0
        count += 1
        if os.preadv(files[spill], [bytes_of[4 * at : 4 * (at + length)]], start) != 4 * length:
            raise OSError("a document's tokens are incomplete")
        number[row, at - row * shape[1] : at - row * shape[1] + length] = count
        at += length
    trained = (tokens & TRAINED) > 0
    tokens &= ~TRAINED
    directory.mkdir(parents=True)
    for name, array in (("tokens", tokens), ("trained", trained), ("document", number)):
        np.save(directory / f"{name}.npy", array)
