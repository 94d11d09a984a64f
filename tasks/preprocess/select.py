"""Select training and held-out documents: without duplicates, and without held-out text in training."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tasks.preprocess.read import SourcePart
from tasks.preprocess.words import COMMON, OVERLAP, PERMUTATIONS, Grams, near_duplicates, row_ngrams
from tasks.preprocess.worker import NO_SIGNATURE

CHUNK = 1 << 20  # bytes of words processed at a time: fits the CPU cache


@dataclass(frozen=True)
class Selection:
    """Documents sorted by their digests, so that the order of the rows does not matter."""

    train: np.ndarray
    heldout: np.ndarray
    removed: dict[str, int]  # number of documents by the reason they were removed


def select(part: SourcePart, near: float | None) -> Selection:
    """Remove exact duplicates, training documents that overlap held-out ones and, if `near` is set, near-duplicates.

    Takes the table out of the part, since it may be large.
    """
    table, part.documents = part.documents, part.documents[:0]
    order = np.argsort(table["key"], kind="stable")
    on_heldout = table["heldout"][order]
    removed = {"duplicate": 0}
    heldout, train = (_without_duplicates(table, order[side], removed) for side in (on_heldout, ~on_heldout))
    del table
    train = _without(train, np.isin(train["content"], heldout["content"]), "in evaluation", removed)
    train = _without(train, overlapping(part, train, heldout), "near evaluation", removed)
    train = _without(train, _near(part, train, near), "near duplicate", removed)
    return Selection(train, heldout, {reason: count for reason, count in removed.items() if count})


def _without_duplicates(table: np.ndarray, places: np.ndarray, removed: dict[str, int]) -> np.ndarray:
    _, first = np.unique(table["content"][places], return_index=True)
    removed["duplicate"] += len(places) - len(first)
    return table[places[np.sort(first)]]


def _without(documents: np.ndarray, out: np.ndarray, reason: str, removed: dict[str, int]) -> np.ndarray:
    removed[reason] = int(out.sum())
    return documents[~out] if removed[reason] else documents


def overlapping(part: SourcePart, train: np.ndarray, heldout: np.ndarray) -> np.ndarray:
    """Which training documents share OVERLAP words in a row with a held-out one, ignoring boilerplate: bool [train].

    Boilerplate is a run of words that many training documents share, such as a task's instruction: more than COMMON of
    them, or more than a fifth if there are few. Runs that overlap boilerplate do not count either.
    """
    overlaps = np.zeros(len(train), dtype=bool)
    grams = Grams(_heldout_grams(part, heldout, lambda grams, _: grams))
    if not len(grams.grams):
        return overlaps
    times = np.zeros(len(grams.grams), dtype=np.int32)

    def find(chunk: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a training document and a held-out n-gram that it has."""
        places, words, counts = chunk
        in_chunk, row = row_ngrams(words, counts, OVERLAP)
        at, gram = grams.find(in_chunk)
        pairs = np.unique(np.stack([places[row[at]], gram]), axis=1)  # a document counts once
        return pairs[0], pairs[1]

    for _, gram in _threads(find, _words(part, train)):
        np.add.at(times, gram, 1)
    common = times > max(1, min(COMMON, len(train) // 5))

    def distinctive(in_heldout: np.ndarray, row: np.ndarray) -> np.ndarray:
        index = np.searchsorted(grams.grams, in_heldout)
        return in_heldout[(times[index] > 0) & ~_touching(common[index], row)]

    grams = Grams(_heldout_grams(part, heldout, distinctive))
    if len(grams.grams):
        for document, _ in _threads(find, _words(part, train)):
            overlaps[document] = True
    return overlaps


def _heldout_grams(
    part: SourcePart, heldout: np.ndarray, choose: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """The n-grams of held-out documents that `choose` keeps; it is given n-grams and the row of each."""
    grams = np.empty(int(heldout["words_size"].sum(dtype=np.int64)) // 4, dtype=np.uint64)
    count = 0
    for _, words, counts in _words(part, heldout):
        kept = choose(*row_ngrams(words, counts, OVERLAP))
        grams[count : count + len(kept)] = kept
        count += len(kept)
    return grams[:count]


def _touching(common: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which n-grams share a word with a common one of the same row: bool [n-grams]."""
    touching = common.copy()
    for shift in range(1, min(OVERLAP, len(common))):
        same = row[shift:] == row[:-shift]
        touching[shift:] |= common[:-shift] & same
        touching[:-shift] |= common[shift:] & same
    return touching


def _words(part: SourcePart, documents: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Words in chunks, in the order of the files: indices into `documents`, hashes, and the number of words of each."""
    for spill, name in enumerate(part.spills):
        places = np.flatnonzero((documents["spill"] == spill) & (documents["words_size"] >= 4 * OVERLAP))
        places = places[np.argsort(documents["words_at"][places])]
        with (part.directory / f"{name}.words").open("rb") as file:
            for chunk in _chunks(places, documents["words_size"]):
                sizes = documents["words_size"][chunk].astype(np.int64)
                starts = documents["words_at"][chunk].astype(np.int64)
                gaps = np.flatnonzero(starts[1:] != starts[:-1] + sizes[:-1]) + 1
                parts = []
                for first, last in zip([0, *gaps], [*gaps, len(chunk)], strict=True):  # contiguous in the file
                    file.seek(starts[first])
                    parts.append(file.read(starts[last - 1] + sizes[last - 1] - starts[first]))
                yield chunk, np.frombuffer(b"".join(parts), dtype=np.uint32), sizes // 4


def _chunks(places: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    if len(places):
        total = np.cumsum(sizes[places].astype(np.int64))
        yield from np.split(places, np.flatnonzero(np.diff(total // CHUNK)) + 1)


def _threads(function, chunks):  # type: ignore[no-untyped-def]
    """Like map, but with a thread per core (numpy releases the GIL) and a bounded number of chunks ahead."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = []
        for chunk in chunks:
            waiting.append(pool.submit(function, chunk))
            if len(waiting) > (os.cpu_count() or 1):
                yield waiting.pop(0).result()
        for result in waiting:
            yield result.result()


def _near(part: SourcePart, train: np.ndarray, threshold: float | None) -> np.ndarray:
    duplicate = np.zeros(len(train), dtype=bool)
    signed = np.flatnonzero(train["signatures_at"] != NO_SIGNATURE)
    if threshold is None or not len(signed):
        return duplicate
    signatures = np.empty((len(signed), PERMUTATIONS), dtype=np.uint32)
    for spill, name in enumerate(part.spills):
        mine = train["spill"][signed] == spill
        stored = np.fromfile(part.directory / f"{name}.signatures", dtype=np.uint32).reshape(-1, PERMUTATIONS)
        signatures[mine] = stored[train["signatures_at"][signed[mine]] // (4 * PERMUTATIONS)]
    duplicate[signed] = near_duplicates(signatures, threshold)
    return duplicate
