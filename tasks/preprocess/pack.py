"""Packing: documents of any length into rows of one length, with next to no padding and nothing cut."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks.preprocess.chat import Document


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign documents to rows: the longest first, each to the row that it fills best.

    Returns, for each row, the positions in `lengths` of its documents, none longer than `capacity`.
    https://en.wikipedia.org/wiki/Best-fit_bin_packing
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows that have as many
    spaces: list[int] = []  # keys of open_rows, sorted
    for document in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        length = lengths[document]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(document)
        left = space - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(spaces, left)
            open_rows[left].append(row)
    return rows


def write_packed(documents: Sequence[Document], context: int, directory: Path) -> tuple[int, float]:
    """Pack documents and write them as memory-mappable arrays of shape [rows, context].

    `tokens.npy` (uint32), `trained.npy` (bool: the token is a target) and `document.npy` (uint16: 1, 2, ... within
    the row, 0 for padding). Returns the number of rows and the share of tokens that are no padding.
    """
    rows = best_fit_decreasing([len(document.tokens) for document in documents], context)
    directory.mkdir(parents=True)
    shape = (len(rows), context)
    tokens = np.zeros(shape, dtype=np.uint32)
    trained = np.zeros(shape, dtype=bool)
    number = np.zeros(shape, dtype=np.uint16)
    for row, members in enumerate(rows):
        at = 0
        for order, member in enumerate(members, 1):
            document = documents[member]
            end = at + len(document.tokens)
            tokens[row, at:end], trained[row, at:end], number[row, at:end] = document.tokens, document.trained, order
            at = end
    for name, array in (("tokens", tokens), ("trained", trained), ("document", number)):
        np.save(directory / f"{name}.npy", array)
    return len(rows), float((number > 0).mean())
