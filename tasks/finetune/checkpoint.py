"""Checkpoints: complete or absent, written while training goes on, readable at any world size."""

import datetime
import json
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from forge.core.errors import ForgeError
from tasks.finetune.checkpoint_mirror import FACTS, Bucket
from tasks.finetune.process_group import Rank

READ_OR_WRITTEN = datetime.timedelta(hours=1)  # at most, by the rank that takes longest
# One process needs no group to save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")
PARTIAL = ".partial"


class Checkpoints:
    """Of one training job, in a directory that all ranks see. A checkpoint is complete when it bears its name.

    Beside weights and optimizer there is `facts.json`: the steps done, and what the loop knows. Where there is a bucket
    they are copied there, and from there where it has a later one.
    """

    def __init__(self, directory: Path, rank: Rank, keep: int, bucket: Bucket | None = None) -> None:
        self.directory, self.rank, self.keep = directory, rank, keep
        self.bucket = bucket if rank.first else None
        # Of its own: async_save aborts the process where training's collectives share the group.
        self._group = distributed.new_group(backend="gloo", timeout=READ_OR_WRITTEN) if rank.world > 1 else None
        self._saving: Future[Any] | None = None
        self._step = 0  # that is being saved
        self._best: int | None = None
        if rank.first:
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(f"*{PARTIAL}"):
                shutil.rmtree(left)

    def load(self, model: Any, optimizer: Any, step: int | None = None) -> dict[str, Any] | None:
        """Restore a step's checkpoint, by default the latest one's; returns its facts, or None if there is none."""
        self.wait()
        if self.bucket and step is None:
            self._fetch(self.bucket)
        if self._group:
            distributed.barrier(self._group)
        steps = self._steps()
        if not steps:
            return None
        directory = self._place(steps[-1] if step is None else step)
        facts = _facts(directory)
        self._best = facts.get("best_step")
        state = _state(model, optimizer)
        reader = FileSystemReader(directory)
        try:
            dcp.load(state, storage_reader=reader, process_group=self._group, no_dist=not self._group)
        except CheckpointException as error:
            raise ForgeError(
                f"training: the checkpoint {directory} cannot be read ({reason(error)}); remove it, and the same "
                "command goes on from what else is saved"
            ) from None
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_options(model),
        )
        return facts

    def save(self, model: Any, optimizer: Any, facts: dict[str, Any]) -> None:
        """Begin to save; the weights may be changed as soon as this returns. Every rank calls it at the same step."""
        self.wait()
        self._best, self._step = facts.get("best_step"), facts["step"]
        place = self._place(facts["step"])
        partial = place.with_name(place.name + PARTIAL)
        if place.exists():
            return
        if self.rank.first:
            partial.mkdir(exist_ok=True)  # another rank may have been here before
            (partial / FACTS).write_text(json.dumps(facts))
        self._saving = dcp.async_save(  # type: ignore[assignment]
            _state(model, optimizer),
            storage_writer=FileSystemWriter(partial),
            process_group=self._group,
            no_dist=not self._group,
        )

    def wait(self) -> None:
        """Until what is being saved is complete; ForgeError if it could not be written."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except (Exception, CheckpointException) as error:
            raise ForgeError(
                f"training: the checkpoint in {self.directory} cannot be written ({reason(error)}); free space there"
            ) from None
        if self.rank.first:
            self._complete(self._place(self._step))

    def settle(self) -> None:
        """Until all that was saved is complete, its copy too, and on all ranks: the first to leave has others ended."""
        self.wait()
        if self.bucket:
            self.bucket.wait()
        if self._group:
            distributed.barrier(self._group)

    def poll(self) -> None:
        """Give a checkpoint that is written by now its name."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def remove(self) -> None:
        """All of them: the job is done."""
        self.wait()
        if self.bucket:
            self.bucket.remove()
        if self.rank.first:
            _discard(self.directory)

    def _complete(self, place: Path) -> None:
        os.rename(place.with_name(place.name + PARTIAL), place)
        steps = self._steps()
        best = [step for step in steps if step == self._best]
        kept = {self._place(step) for step in (*steps[-self.keep :], *best)}
        needed = kept
        if self.bucket:
            # The best one first: where the latest one is, whoever goes on from it finds the best one too.
            self.bucket.copy([*(self._place(step) for step in best), place], {one.name for one in kept})
            needed = kept | self.bucket.needed()
        for step in steps:
            if self._place(step) not in needed:
                _discard(self._place(step))

    def _fetch(self, bucket: Bucket) -> None:
        """From the bucket, the latest checkpoint where it has a later one, and the best one where that is not here."""
        newest = bucket.newest()
        if newest is not None and newest > max(self._steps(), default=-1):
            bucket.download(self._place(newest))
        steps = self._steps()
        best = _facts(self._place(steps[-1])).get("best_step") if steps else None
        if best is not None and best not in steps:
            bucket.download(self._place(best))

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def _place(self, step: int) -> Path:
        return self.directory / f"{step:08}"


def _discard(directory: Path) -> None:
    """Remove a directory; what is left when that is broken off bears no name that counts."""
    left = directory.with_name(directory.name + PARTIAL)
    if left.exists():
        shutil.rmtree(left)
    os.rename(directory, left)
    shutil.rmtree(left)


def reason(error: BaseException) -> str:
    """Why a checkpoint could not be read or written, in a line; of several ranks' reasons the first one's."""
    if isinstance(error, CheckpointException):
        error, _ = error.failures[min(error.failures)]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _facts(directory: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((directory / FACTS).read_text())
    return facts


def _options(model: Any) -> StateDictOptions:
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    """What is trained, and the optimizer's moments; a rank's share of them where they are sharded."""
    options = _options(model)
    weights, moments = get_state_dict(model, optimizer, options=options)
    if options.ignore_frozen_params:  # but not what belongs to them: a quantised weight has its constants beside it
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = {name: weight for name, weight in weights.items() if name in trained}
    return {"model": weights, "optimizer": moments}
