"""Times a part of a side, also where the machine is busy with something else."""

import time

import psutil


class Timer:
    """Adds up the seconds in its `with` blocks: by the clock, and of CPU, over the process and its workers."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= cpu_seconds()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += cpu_seconds()


def cpu_seconds() -> float:
    """CPU time so far of this process and its descendants, also of those that have ended.

    Workers may be started by a server process; whoever started one has its time once it has ended.
    """
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(spent.user + spent.system + spent.children_user + spent.children_system for spent in times)
