"""Memory-mapped packed rows, in an order that only the seed decides."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Packed rows as int64 tensors [rows, context].

    `positions` restart with each document: models in transformers then keep attention within documents. `targets` are
    the tokens to predict at each position, IGNORED where none is trained.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.tokens.to(device), self.positions.to(device), self.targets.to(device))


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

    def _rows(self, shards: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        shard_of = np.searchsorted(self._first, rows, side="right") - 1
        return np.stack([shards[shard][row - self._first[shard]] for row, shard in zip(rows, shard_of, strict=True)])

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows, ready for the model."""
        tokens = torch.from_numpy(self._rows(self._tokens, rows).astype(np.int64))
        document = torch.from_numpy(self._rows(self._document, rows).astype(np.int64))
        targets = torch.full_like(tokens, IGNORED)
        trained = torch.from_numpy(self._rows(self._trained, rows))[:, 1:]
        targets[:, :-1][trained] = tokens[:, 1:][trained]
        return Batch(tokens, positions(document), targets)


def positions(document: torch.Tensor) -> torch.Tensor:
    """Position of each token in its document: int64 [rows, context], from document numbers of the same shape."""
    place = torch.arange(document.shape[1]).expand_as(document)
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
