"""What makes one training process a rank among others, and what tells the user which rank failed first, and why."""

import contextlib
import ctypes
import datetime
import faulthandler
import gc
import json
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from torch import distributed

from forge.cluster.gpus import check_gpus_seen
from forge.core.errors import ForgeError

ROOT_CAUSE_WAIT = 1.0  # seconds
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
STACK_AT = 0.9  # of that time
PR_SET_PDEATHSIG = 1  # prctl(2)
_PLACES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


class Stopped(ForgeError):
    """Told to end by a signal, and saved."""


@dataclass(frozen=True)
class Rank:
    """This process's place in the group."""

    rank: int
    world: int
    device: torch.device
    stop: threading.Event = field(default_factory=threading.Event)  # set when it is told to end
    stack: TextIO | None = None  # where it says what it was doing when it was not heard of for long

    @property
    def first(self) -> bool:
        """Whether this is the rank that reports and writes."""
        return self.rank == 0

    def first_says(self, answer: bool) -> bool:
        """The first rank's answer, which all have to go by."""
        said = [answer]
        if self.world > 1:
            distributed.broadcast_object_list(said)
        return said[0]

    def alive(self) -> None:
        """Say that this rank gets on; its stack is written where it has not said so just before others give it up."""
        if self.stack is not None:
            faulthandler.dump_traceback_later(COLLECTIVE_TIMEOUT.total_seconds() * STACK_AT, file=self.stack)


@contextlib.contextmanager
def process_group(failure: Path, gpus: int = 0) -> Iterator[Rank]:
    """Join the group that torchrun's environment variables describe; leave it at the end.

    Whichever rank raises first writes its error to `failure`; a rank that raises later (most often because the first
    one has gone in the middle of a collective) raises the first one's instead. Where ranks name that file differently,
    as those of different launchers do, the first rank's name counts once they have joined. An error that may be such a
    consequence waits a moment before it is written, in which a killed rank's launcher ends this one too.

    A rank that hangs is given up by the others when a collective has waited for COLLECTIVE_TIMEOUT. What each rank was
    doing is then in a file beside `failure`, and where the hanging one was is in the message.

    ForgeError where this machine has fewer than `gpus` GPUs, the number that was asked for.
    """
    stop = threading.Event()
    _end_with_parent()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _PLACES)
    stack = None
    if rank == 0:
        failure.unlink(missing_ok=True)  # in another container, an earlier launcher had the same number
    try:
        check_gpus_seen(gpus)
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        else:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
        if world > 1:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
            name = [failure.name]
            distributed.broadcast_object_list(name)
            failure = failure.with_name(name[0])
            stack = _stack_file(failure, rank).open("w", encoding="utf-8")
        # Only now: until others answer, a wait for them would sit through the signal.
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        yield Rank(rank, world, device, stop, stack)
    except Exception as error:
        if world > 1 and isinstance(error, RuntimeError):  # what collectives raise
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if stop.is_set():
                signal.raise_signal(signal.SIGTERM)
            time.sleep(ROOT_CAUSE_WAIT)
        first = _record_first(failure, rank, error)
        traceback.clear_frames(error.__traceback__)
        raise ForgeError(describe_failure(first)) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
        if distributed.is_initialized():
            # What still held the group (DDP does) would end it later, with the interpreter's lock in hand, for which
            # the group's own threads may be waiting: a deadlock.
            gc.collect()
            distributed.destroy_process_group()
        if stack is not None:
            stack.close()
            if not os.path.getsize(stack.name):
                os.unlink(stack.name)


def read_failure(failure: Path) -> dict[str, str] | None:
    """The first rank's failure, where one was written."""
    try:
        found: dict[str, str] = json.loads(failure.read_text())
    except FileNotFoundError:
        return None
    return found


def describe_failure(failure: dict[str, str]) -> str:
    """What the user reads."""
    where = f" ({failure['where']})" if failure["where"] else ""
    return f"training failed on rank {failure['rank']}: {failure['message']}{where}"


def describe_stacks(failure: Path) -> str:
    """Where the ranks were that were not heard of for long; empty if there are none."""
    found = []
    for file in sorted(failure.parent.glob(f"{failure.stem}.rank*.stack")):
        *_, main = file.read_text(encoding="utf-8").split("Thread 0x")  # the threads' stacks, the main one's last
        if place := re.search(r'File "(.*)", line (\d+) in (.*)', main):
            rank = file.suffixes[-2].removeprefix(".rank")
            found.append(f"; rank {rank} was in {place[3]} ({place[1]}:{place[2]}; its whole stack is in {file})")
    return "".join(found)


def _stack_file(failure: Path, rank: int) -> Path:
    failure.parent.mkdir(parents=True, exist_ok=True)
    return failure.with_name(f"{failure.stem}.rank{rank}.stack")


def _record_first(failure: Path, rank: int, error: Exception) -> dict[str, str]:
    """Write this error unless another rank's is there already; return the one that is there."""
    user_error = isinstance(error, ForgeError)
    message = error.message if user_error else f"{type(error).__name__}: {error}"  # type: ignore[attr-defined]
    last = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    found = {
        "rank": str(rank),
        "message": message + describe_stacks(failure),
        "where": "" if user_error or last is None else f"{last.filename}:{last.lineno}; traceback in {failure}",
        "stopped": "yes" if isinstance(error, Stopped) else "",
        "traceback": "".join(traceback.format_exception(error)),
    }
    staged = failure.with_name(f"{failure.name}.{os.getpid()}")
    staged.parent.mkdir(parents=True, exist_ok=True)
    staged.write_text(json.dumps(found, indent=2))
    try:
        os.link(staged, failure)  # complete or not there; fails where another rank was first
    except FileExistsError:
        return read_failure(failure) or found
    finally:
        staged.unlink()
    return found


def _end_with_parent() -> None:
    """End at once on Ctrl-C, on SIGTERM, and when the launcher dies, even by SIGKILL (on Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
