"""Process identity that survives reused PIDs and holds across containers, ways to exit, and the end of a log."""

import gc
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import NoReturn


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has exited. See /proc/[pid]/stat in proc(5)."""
    try:  # the program's name, which is not needed, may be any bytes
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def this_process() -> str:
    """A unique name for this process, boot.namespace.pid.start, which is safe in file names."""
    return f"{_namespace()}.{os.getpid()}.{start_ticks(os.getpid())}"


def is_alive(process: str) -> bool | None:
    """Whether a process that `this_process` named is alive; None if that can't be seen from here.

    A PID is meaningful only within one boot and one PID namespace: every container counts from 1, and several may have
    the same hostname.
    """
    namespace, pid, ticks = process.rsplit(".", 2) if process.count(".") == 3 else ("", "", "")
    return str(start_ticks(int(pid))) == ticks if namespace == _namespace() else None


def _namespace() -> str:
    """This boot of this machine, and the PID namespace; a random name if they are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"unknown.{uuid.uuid4().hex}"


def end_by(number: int) -> NoReturn:
    """Exit immediately by a signal, without running the signal's handler."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)  # PID 1 of a container ignores signals that it sends to itself


def end_soon() -> None:
    """Skip the garbage collection at exit, which takes seconds with torch loaded. Call it just before exiting."""
    gc.freeze()


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a process's log, indented for an error message."""
    return "\n".join(f"  {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
