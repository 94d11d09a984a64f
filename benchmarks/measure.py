"""Runs a side in processes of its own, and samples the memory of all of them."""

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
EVERY, PSS_EVERY, TOLD_EVERY = 0.05, 1.0, 15.0  # seconds
BUSY = 0.15  # cores
MB = 1_000_000


class SideFailed(Exception):
    """A side ended with an error; the message is the end of its output."""


def run_side(
    python: Path,
    side: str,
    folder: Path,
    arguments: dict[str, Any],
    variables: dict[str, str] | None = None,
    server: psutil.Process | None = None,
) -> dict[str, Any]:
    """Run benchmarks.<side> and return what it found, with the peaks of its memory; `variables` join its environment.

    `peak_rss_mb` is the largest sum of the resident memory of its processes, sampled every 50 ms: pages that
    processes share count once for each. `peak_pss_mb`, sampled every second (reading it takes the kernel longer),
    divides shared pages among those who share them. `peak_gpu_mb`, where there are GPUs, is the most of their memory in
    use, sampled every second, less what was in use before. MB are 10^6 bytes. `other_cores` is the mean number of cores
    that other programs were using, `server` not counted: where it is far from 0, the side's time says little. Raises
    SideFailed.
    """
    folder.mkdir()
    places = {name: str(folder) for name in ("TMPDIR", "HF_HOME")}
    os.sync()  # what was written before is not written while this side is timed
    with (folder / "output.txt").open("w+b") as output:
        process = subprocess.Popen(
            [python, "-m", f"benchmarks.{side}", json.dumps(arguments | {"folder": str(folder)})],
            cwd=PROJECT,
            env=os.environ | places | {"HF_HUB_OFFLINE": "1"} | (variables or {}),
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
            raise SideFailed("\n".join([f"{side} ended with status {process.returncode}:", *last]))
    found = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)
    return found | peaks


def watch(process: subprocess.Popen[bytes], side: str, server: psutil.Process | None = None) -> dict[str, float]:
    """The peaks of the memory (MB) of a process and its descendants until it ends, and how busy others were (cores)."""
    root, own = psutil.Process(process.pid), psutil.Process()
    rss = pss = gpu = 0
    gpu_before = gpu_memory()
    worked: dict[int, float] = {}  # process -> CPU seconds
    ours = [own] if server is None else [own, server]
    began, ours_before = busy(psutil.cpu_times()), sum(busy(one.cpu_times()) for one in ours)
    started = told = measured = time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        members = []
        with contextlib.suppress(psutil.NoSuchProcess):
            members = [root, *root.children(recursive=True)]
        resident = 0
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):  # zombies too
                resident += member.memory_info().rss
                worked[member.pid] = busy(member.cpu_times())
        rss = max(rss, resident)
        if now - measured > PSS_EVERY:
            measured = now
            pss = max(pss, sum(proportional(member) for member in members))
            gpu = max(gpu, gpu_memory() - gpu_before)
        if now - told > TOLD_EVERY:
            told = now
            say(f"{side}: {now - started:.0f} s, at most {rss / MB:,.0f} MB so far")
        time.sleep(max(0.0, EVERY - (time.monotonic() - now)))
    others = busy(psutil.cpu_times()) - began - sum(worked.values())
    others -= sum(busy(one.cpu_times()) for one in ours) - ours_before
    other_cores = round(max(0.0, others) / (time.monotonic() - started), 2)
    if other_cores > BUSY:
        say(f"{side}: other programs were using {other_cores} cores meanwhile, so its time says little")
    peaks = {"peak_rss_mb": round(rss / MB, 1), "peak_pss_mb": round(pss / MB, 1), "other_cores": other_cores}
    return peaks | ({"peak_gpu_mb": round(gpu / MB, 1)} if gpu else {})


def proportional(process: psutil.Process) -> int:
    """Resident bytes of a process, each page divided by those who share it; 0 for one that has ended."""
    try:
        return process.memory_full_info().pss
    except psutil.NoSuchProcess:
        return 0


def gpu_memory() -> int:
    """Bytes in use on all GPUs of the machine, whoever uses them; 0 where there are none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)


def busy(times: Any) -> float:
    """CPU seconds of a process, or of all of them."""
    return sum(getattr(times, part, 0.0) for part in ("user", "nice", "system", "irq", "softirq"))


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
