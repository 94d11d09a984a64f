"""Join the process group, and report which rank failed first, and why."""

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
STACK_AT = 0.9  # fraction of that time after which a silent rank writes its stack
PR_SET_PDEATHSIG = 1  # prctl(2)
_RANK_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))  # with defaults


class Stopped(ForgeError):
    """Training was stopped by a signal, and has saved its state."""


@dataclass(frozen=True)
class Rank:
    """This process's rank in the group."""

    rank: int
    world_size: int
    device: torch.device
    stop: threading.Event = field(default_factory=threading.Event)  # set by SIGTERM
    stack: TextIO | None = None  # the file that gets its stack if it hangs

    @property
    def first(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.rank == 0

    def broadcast_from_first(self, value: bool) -> bool:
        """The first rank's value, on all ranks."""
        values = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(values)
        return values[0]

    def heartbeat(self) -> None:
        """Postpone writing this rank's stack, which happens shortly before the other ranks time out waiting for it."""
        if self.stack is not None:
            faulthandler.dump_traceback_later(COLLECTIVE_TIMEOUT.total_seconds() * STACK_AT, file=self.stack)


@contextlib.contextmanager
def process_group(failure: Path, gpus: int = 0) -> Iterator[Rank]:
    """Join the process group of torchrun's environment variables, and leave it at the end.

    The rank that raises first writes its error to the file `failure`. A rank that raises later, usually because the
    first one left during a collective, raises the first one's error instead. Launchers may name the file differently;
    once the ranks have joined they all use the first rank's name. An error that may only be a consequence is written
    after a short wait, in which the launcher of a killed rank stops this one too.

    If a rank hangs, the others time out in a collective after COLLECTIVE_TIMEOUT. Each rank's stack is then in a file
    next to `failure`, and the message says where the hanging rank was.

    Raises ForgeError if this machine has fewer than `gpus` GPUs.
    """
    stop = threading.Event()
    _exit_with_launcher()
    rank, world_size, local = (int(os.environ.get(name, default)) for name, default in _RANK_VARIABLES)
    stack = None
    if rank == 0:
        failure.unlink(missing_ok=True)  # an earlier launcher, in another container, had the same process ID
    try:
        check_gpus_seen(gpus)
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        else:
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        if world_size > 1:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
            name = [failure.name]
            distributed.broadcast_object_list(name)
            failure = failure.with_name(name[0])
            stack = _stack_file(failure, rank).open("w", encoding="utf-8")
        # Not earlier: while this rank waits for the others to join, nothing would react to the event.
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        yield Rank(rank, world_size, device, stop, stack)
    except Exception as error:
        if world_size > 1 and isinstance(error, RuntimeError):  # collectives raise these
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
            # An object that still holds the group (as DDP does) would destroy it later with the GIL held, while the
            # group's threads may be waiting for the GIL: a deadlock.
            gc.collect()
            distributed.destroy_process_group()
        if stack is not None:
            stack.close()
            if not os.path.getsize(stack.name):
                os.unlink(stack.name)


def read_failure(failure: Path) -> dict[str, str] | None:
    """The failure that was written first, if any."""
    try:
        recorded: dict[str, str] = json.loads(failure.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return recorded


def describe_failure(failure: dict[str, str]) -> str:
    """The message for the user."""
    where = f" ({failure['where']})" if failure["where"] else ""
    return f"training failed on rank {failure['rank']}: {failure['message']}{where}"


def describe_stacks(failure: Path) -> str:
    """Where hanging ranks were, as the end of a message; "" if none hung."""
    places = []
    for file in sorted(failure.parent.glob(f"{failure.stem}.rank*.stack")):
        *_, main = file.read_text(encoding="utf-8").split("Thread 0x")  # one stack per thread, the main thread's last
        if place := re.search(r'File "(.*)", line (\d+) in (.*)', main):
            rank = file.suffixes[-2].removeprefix(".rank")
            places.append(f"; rank {rank} was in {place[3]} ({place[1]}:{place[2]}; its full stack is in {file})")
    return "".join(places)


def _stack_file(failure: Path, rank: int) -> Path:
    failure.parent.mkdir(parents=True, exist_ok=True)
    return failure.with_name(f"{failure.stem}.rank{rank}.stack")


def _record_first(failure: Path, rank: int, error: Exception) -> dict[str, str]:
    """Write this error unless another rank has written one; returns the one that was first."""
    user_error = isinstance(error, ForgeError)
    message = error.message if user_error else f"{type(error).__name__}: {error}"  # type: ignore[attr-defined]
    last = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    recorded = {
        "rank": str(rank),
        "message": message + describe_stacks(failure),
        "where": "" if user_error or last is None else f"{last.filename}:{last.lineno}; traceback in {failure}",
        "stopped": "yes" if isinstance(error, Stopped) else "",
        "traceback": "".join(traceback.format_exception(error)),
    }
    staged = failure.with_name(f"{failure.name}.{os.getpid()}")
    try:
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(recorded, indent=2), encoding="utf-8")
        os.link(staged, failure)  # atomic; fails if another rank was first
    except FileExistsError:
        return read_failure(failure) or recorded
    except OSError:
        return recorded  # the disk is full, which may be this error itself
    finally:
        staged.unlink(missing_ok=True)
    return recorded


def _exit_with_launcher() -> None:
    """Exit immediately on Ctrl-C, on SIGTERM, and (on Linux) when the launcher dies, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
