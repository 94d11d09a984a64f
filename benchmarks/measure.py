"""Run one side of a benchmark in separate processes, and sample their memory."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pynvml

PROJECT = Path(__file__).resolve().parents[1]
EVERY, PSS_EVERY, LOG_EVERY = 0.05, 1.0, 15.0  # seconds
BUSY = 0.15  # cores in use by others from which a warning is printed
MB = 1_000_000


class SideFailed(Exception):
    """A side failed; the message is the end of its output."""


def run_side(
    python: Path,
    side: str,
    folder: Path,
    arguments: dict[str, Any],
    variables: dict[str, str] | None = None,
    server: psutil.Process | None = None,
) -> dict[str, Any]:
    """Run benchmarks.<side> and return its result and its peak memory; `variables` are added to its environment.

    `peak_rss_mb` is the largest sum of its processes' resident memory, sampled every 50 ms; shared pages count once per
    process. `peak_pss_mb`, sampled every second (it is slower to read), divides shared pages among the processes that
    share them. `peak_gpu_mb`, with GPUs, is the increase of their memory in use, sampled every second. MB are 10^6
    bytes. `other_cores` is the mean number of cores that other programs used, except `server`: if it is far from 0, the
    side's time is unreliable.

    Raises SideFailed.
    """
    folder.mkdir()
    directories = {name: str(folder) for name in ("TMPDIR", "HF_HOME")}
    os.sync()  # so that earlier writes do not disturb this side
    with (folder / "output.txt").open("w+b") as output:
        process = subprocess.Popen(
            [python, "-m", f"benchmarks.{side}", json.dumps(arguments | {"folder": str(folder)})],
            cwd=PROJECT,
            env=os.environ | directories | {"HF_HUB_OFFLINE": "1"} | (variables or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            peaks = watch(process, side, server)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace").splitlines()[-40:]
            raise SideFailed("\n".join([f"{side} exited with status {process.returncode}:", *last]))
    result = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)
    return result | peaks


def watch(process: subprocess.Popen[bytes], side: str, server: psutil.Process | None = None) -> dict[str, float]:
    """Peak memory (MB) of a process and its descendants until it exits, and the cores that other programs used."""
    root, own = psutil.Process(process.pid), psutil.Process()
    rss = pss = gpu = 0
    gpu_before = gpu_memory()
    cpu_seconds: dict[int, float] = {}  # by process
    ours = [own] if server is None else [own, server]
    before, ours_before = busy(psutil.cpu_times()), sum(busy(process.cpu_times()) for process in ours)
    started = logged = measured = time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        members = []
        with contextlib.suppress(psutil.NoSuchProcess):
            members = [root, *root.children(recursive=True)]
        resident = 0
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):  # raised for zombies too
                resident += member.memory_info().rss
                cpu_seconds[member.pid] = busy(member.cpu_times())
        rss = max(rss, resident)
        if now - measured > PSS_EVERY:
            measured = now
            pss = max(pss, sum(proportional(member) for member in members))
            gpu = max(gpu, gpu_memory() - gpu_before)
        if now - logged > LOG_EVERY:
            logged = now
            say(f"{side}: {now - started:.0f} s, at most {rss / MB:,.0f} MB so far")
        time.sleep(max(0.0, EVERY - (time.monotonic() - now)))
    others = busy(psutil.cpu_times()) - before - sum(cpu_seconds.values())
    others -= sum(busy(process.cpu_times()) for process in ours) - ours_before
    other_cores = round(max(0.0, others) / (time.monotonic() - started), 2)
    if other_cores > BUSY:
        say(f"{side}: other programs used {other_cores} cores meanwhile, so its time is unreliable")
    peaks = {"peak_rss_mb": round(rss / MB, 1), "peak_pss_mb": round(pss / MB, 1), "other_cores": other_cores}
    return peaks | ({"peak_gpu_mb": round(gpu / MB, 1)} if gpu else {})


def proportional(process: psutil.Process) -> int:
    """Proportional set size of a process in bytes; 0 if it has exited."""
    try:
        return process.memory_full_info().pss
    except psutil.NoSuchProcess:
        return 0


def gpu_memory() -> int:
    """Bytes in use on all GPUs of the machine, by any program; 0 without GPUs."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)


def busy(times: Any) -> float:
    """CPU seconds in the times of a process or of the machine."""
    return sum(getattr(times, part, 0.0) for part in ("user", "nice", "system", "irq", "softirq"))


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
