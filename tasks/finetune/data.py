"""Memory-mapped packed rows, in an order that only the seed decides."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Packed rows, or documents padded on the right, as int64 tensors [rows, length].

    `positions` restart with each document: most models in transformers then keep attention within documents. `targets`
    are the tokens to predict at each position, IGNORED where none is trained.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.tokens.to(device), self.positions.to(device), self.targets.to(device))

    def untrained(self) -> "Batch":
        """The same batch without targets."""
        return Batch(self.tokens, self.positions, torch.full_like(self.targets, IGNORED))


class PackedRows:
    """The rows of one side of the split, in shards. Processes share the memory-mapped pages."""

    def __init__(self, directory: Path) -> None:
        shards = sorted(path for path in directory.iterdir() if path.is_dir())
        self._tokens, self._trained, self._document = (
            [np.load(shard / f"{name}.npy", mmap_mode="r") for shard in shards]
            for name in ("tokens", "trained", "document")
        )
        self._first = np.cumsum([0, *map(len, self._tokens)])  # first row of each shard, and the total
        # Per row. A document's first token is never a target.
        self.trained_tokens = np.concatenate([trained.sum(axis=1) for trained in self._trained])
        self.all_tokens = np.concatenate([(document > 0).sum(axis=1) for document in self._document])

    def __len__(self) -> int:
        return int(self._first[-1])

    def spans(self, rows: np.ndarray, packed: bool) -> np.ndarray:
        """What a model reads at once: whole rows, or their documents one by one, the longest first.

        Returns an int64 array [spans, 3] of row, first token, and one past the last.
        """
        context = self._tokens[0].shape[1]
        if packed:
            return np.stack([rows, np.zeros_like(rows), np.full_like(rows, context)], axis=1)
        found: list[tuple[int, int, int]] = []
        for row in rows.tolist():
            document = self._row(self._document, row)
            edges = [*np.flatnonzero(np.diff(document, prepend=0)).tolist(), context]
            found += [(row, a, b) for a, b in pairwise(edges) if document[a] > 0]
        return np.array(sorted(found, key=lambda span: span[1] - span[2]), dtype=np.int64)

    def tokens_of(self, row: int) -> np.ndarray:
        """The tokens of a row without padding: int64 [tokens]."""
        return self._row(self._tokens, row)[self._row(self._document, row) > 0].astype(np.int64)

    def _row(self, shards: list[np.ndarray], row: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        found: np.ndarray = shards[shard][row - self._first[shard]]
        return found

    def batch(self, spans: np.ndarray) -> Batch:
        """The given spans, ready for the model."""
        shape = len(spans), int((spans[:, 2] - spans[:, 1]).max())
        arrays = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
        for at, (row, begin, end) in enumerate(spans.tolist()):
            for array, shards in zip(arrays, (self._tokens, self._document, self._trained), strict=True):
                array[at, : end - begin] = self._row(shards, row)[begin:end]
        tokens, document, trained = map(torch.from_numpy, arrays)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, :-1][trained[:, 1:]] = tokens[:, 1:][trained[:, 1:]]
        return Batch(tokens, positions(document), targets)


def micro_batches(spans: np.ndarray, tokens: int, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """This rank's spans for each forward pass, padded to at most `tokens`; every rank has the same number of them.

    A rank for which none is left gets the first one, marked False: it only takes part.
    """
    at = 0
    while at < len(spans):
        longest = int(spans[at, 2] - spans[at, 1])
        group = spans[at : at + world_size * max(1, tokens // longest)]
        mine = group[rank::world_size]
        yield (mine, True) if len(mine) else (group[:1], False)
        at += len(group)


def positions(document: torch.Tensor) -> torch.Tensor:
    """Position of each token in its document: int64 [rows, context], from document numbers of the same shape."""
    place = torch.arange(document.shape[1], device=document.device).expand_as(document)
    first = torch.ones_like(document, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    return place - torch.where(first, place, 0).cummax(dim=1).values


class GlobalBatchSampler:
    """Which rows each step trains on: epoch after epoch, each in its own permutation.

    It has no state to save: the step alone decides.
    """

    def __init__(self, rows: int, global_batch_size: int, epochs: float, seed: int) -> None:
        self.rows, self.global_batch_size, self.seed = rows, global_batch_size, seed
        self.steps = max(1, math.ceil(rows * epochs / global_batch_size))
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def rows_of(self, step: int) -> np.ndarray:
        """Row numbers of a step's global batch: int64 [global_batch_size]."""
        cursor = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        return np.array([self._row(*divmod(int(at), self.rows)) for at in cursor])

    def _row(self, epoch: int, place: int) -> int:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return int(self._permutation[place])
