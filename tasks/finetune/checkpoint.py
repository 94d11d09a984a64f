"""Checkpoints: complete or absent, written in the background, readable at any world size."""

import contextlib
import datetime
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from forge.core.errors import ForgeError
from forge.core.full_disk import explain_full_disk
from tasks.finetune.checkpoint_mirror import STATE, CheckpointMirror
from tasks.finetune.process_group import Rank

TIMEOUT = datetime.timedelta(hours=1)  # for the slowest rank to read or write
# One process needs no group to save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")
PARTIAL = ".partial"


class Checkpoints:
    """The checkpoints of one training job, in a directory that all ranks see.

    A checkpoint is a directory named by its step; it gets that name when it is complete. It holds the weights, the
    optimizer state and the loop's state (STATE). With a mirror, checkpoints are copied to a bucket, and a later one is
    fetched from there.
    """

    def __init__(self, directory: Path, rank: Rank, keep: int, mirror: CheckpointMirror | None = None) -> None:
        self.directory, self.rank, self.keep = directory, rank, keep
        self.mirror = mirror if rank.first else None
        # A separate group: async_save crashes the process if training's collectives use the same one.
        self._group = distributed.new_group(backend="gloo", timeout=TIMEOUT) if rank.world_size > 1 else None
        self._saving: Future[Any] | None = None
        self._saving_step = 0
        self._best: int | None = None
        if rank.first:
            directory.mkdir(parents=True, exist_ok=True)
            for partial in directory.glob(f"*{PARTIAL}"):
                shutil.rmtree(partial)

    def load(self, model: Any, optimizer: Any, step: int | None = None) -> dict[str, Any] | None:
        """Restore a step's checkpoint, by default the latest; returns the loop's state, or None without a checkpoint.

        Raises ForgeError if it cannot be read.
        """
        self.wait()
        if self.mirror and step is None:
            self._fetch(self.mirror)
        if self._group:
            distributed.barrier(self._group)
        steps = self._steps()
        if not steps:
            return None
        directory = self._path(steps[-1] if step is None else step)
        loop_state = _read_loop_state(directory)
        self._best = loop_state.get("best_step")
        state = _model_state(model, optimizer)
        try:
            dcp.load(
                state,
                storage_reader=FileSystemReader(directory),
                process_group=self._group,
                no_dist=not self._group,
            )
        except CheckpointException as error:
            raise ForgeError(
                f"the checkpoint {directory} cannot be read ({checkpoint_error(error)})",
                where="training",
                fix="remove it; the same command then resumes from an earlier one",
            ) from None
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_options(model),
        )
        return loop_state

    def save(self, model: Any, optimizer: Any, loop_state: dict[str, Any]) -> None:
        """Start to save; weights may change as soon as this returns. Every rank calls it after the same step."""
        self.wait()
        self._best, self._saving_step = loop_state.get("best_step"), loop_state["step"]
        path = self._path(self._saving_step)
        partial = path.with_name(path.name + PARTIAL)
        if path.exists():
            return
        if self.rank.first:
            with self._removed_on_failure(partial), explain_full_disk(partial, f"checkpoint {self._saving_step}"):
                partial.mkdir(exist_ok=True)  # another rank may have created it
                (partial / STATE).write_text(json.dumps(loop_state), encoding="utf-8")
        self._saving = dcp.async_save(  # type: ignore[assignment]
            _model_state(model, optimizer),
            storage_writer=FileSystemWriter(partial),
            process_group=self._group,
            no_dist=not self._group,
        )

    def wait(self) -> None:
        """Wait until the current save is complete; ForgeError if it failed."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        path = self._path(self._saving_step)
        partial = path.with_name(path.name + PARTIAL)
        with self._removed_on_failure(partial), explain_full_disk(partial, f"checkpoint {self._saving_step}"):
            try:
                saving.result()
            except (Exception, CheckpointException) as error:
                raise ForgeError(
                    f"the checkpoint in {self.directory} cannot be written ({checkpoint_error(error)})",
                    where="training",
                    fix="make it writable, and run again",
                ) from None
        if self.rank.first:
            self._complete(path)

    def settle(self) -> None:
        """Wait until all ranks have saved and the mirror has its copy. The launcher kills all ranks once one exits."""
        self.wait()
        if self.mirror:
            self.mirror.wait()
        if self._group:
            distributed.barrier(self._group)

    def poll(self) -> None:
        """Complete the current save if it has been written."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def remove(self) -> None:
        """Remove all checkpoints, when the job is done."""
        self.wait()
        if self.mirror:
            self.mirror.remove()
        if self.rank.first:
            _remove(self.directory)

    @contextlib.contextmanager
    def _removed_on_failure(self, partial: Path) -> Iterator[None]:
        """Remove what was written of a checkpoint that cannot be completed. Earlier ones stay, to resume from."""
        try:
            yield
        except Exception:
            if self.rank.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _complete(self, path: Path) -> None:
        """Give a written checkpoint its name, have it mirrored, and prune old ones."""
        os.rename(path.with_name(path.name + PARTIAL), path)
        steps = self._steps()
        best = [self._path(step) for step in steps if step == self._best]
        kept = {*(self._path(step) for step in steps[-self.keep :]), *best}
        in_use: set[Path] = set()
        if self.mirror:
            # The best one first: a run that resumes from the latest one needs it too.
            self.mirror.copy([*best, path], {directory.name for directory in kept})
            in_use = self.mirror.in_use()
        for step in steps:
            if self._path(step) not in kept | in_use:
                _remove(self._path(step))

    def _fetch(self, mirror: CheckpointMirror) -> None:
        """Download the mirror's latest checkpoint if it is later than the local ones, and the best one if missing."""
        latest = mirror.latest()
        if latest is not None and latest > max(self._steps(), default=-1):
            mirror.download(self._path(latest))
        steps = self._steps()
        best = _read_loop_state(self._path(steps[-1])).get("best_step") if steps else None
        if best is not None and best not in steps:
            mirror.download(self._path(best))

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:08}"


def _remove(directory: Path) -> None:
    """Remove a checkpoint. If that is interrupted, the rest has a name that is ignored."""
    partial = directory.with_name(directory.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    os.rename(directory, partial)
    shutil.rmtree(partial)


def checkpoint_error(error: BaseException) -> str:
    """One line that says why a checkpoint could not be read or written; the first rank's if several failed."""
    if isinstance(error, CheckpointException):
        error, _ = error.failures[min(error.failures)]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _read_loop_state(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
    return state


def _options(model: Any) -> StateDictOptions:
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _model_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """The trained weights and the optimizer state; this rank's shards of them if they are sharded."""
    options = _options(model)
    weights, optimizer_state = get_state_dict(model, optimizer, options=options)
    if options.ignore_frozen_params:  # torch still includes the constants of frozen quantised weights
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = {name: weight for name, weight in weights.items() if name in trained}
    return {"model": weights, "optimizer": optimizer_state}
