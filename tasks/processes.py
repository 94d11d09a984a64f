"""Processes, told apart also after their numbers were used again."""

import gc
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended. See stat in proc(5)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def end_soon() -> None:
    """Spare Python, which is about to end, to look through all objects for rings: with torch loaded, for seconds."""
    gc.freeze()
