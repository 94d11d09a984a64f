"""Processes, told apart also after their numbers were used again, and across containers."""

import gc
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import NoReturn


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended. See stat in proc(5)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def this_process() -> str:
    """This process, told from all others: boot.namespace.number.start, which may be part of a file's name."""
    return f"{_namespace()}.{os.getpid()}.{start_ticks(os.getpid())}"


def is_alive(process: str) -> bool | None:
    """Whether a process that `this_process` named lives; None where that can't be seen from here.

    A number means something only within its boot and its PID namespace: containers count from 1, each for itself, and
    may share a hostname.
    """
    namespace, pid, ticks = process.rsplit(".", 2) if process.count(".") == 3 else ("", "", "")
    return str(start_ticks(int(pid))) == ticks if namespace == _namespace() else None


def _namespace() -> str:
    """This boot of this machine, and the PID namespace; where there is no telling, one that equals no other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"unknown.{uuid.uuid4().hex}"


def end_by(number: int) -> NoReturn:
    """End this process by a signal, at once, as if there were no handler for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)  # the first process of a container outlives such signals of its own


def end_soon() -> None:
    """Spare Python, which is about to end, to look through all objects for rings: with torch loaded, for seconds."""
    gc.freeze()
