"""The GPU under a process, as NVML sees it: how hot, how busy, how full. And a pause when it is too hot."""

import contextlib
import logging
import time
from collections.abc import Callable

import pynvml  # type: ignore[import-untyped]
import torch

log = logging.getLogger(__name__)

PAUSE = 1.0  # seconds between looks at a GPU that is too hot
LONGEST_PAUSE = 30.0  # seconds; then training goes on, and the next call pauses again

READINGS: dict[str, tuple[Callable[[torch.device], float], float]] = {  # and the factor to the name's unit
    "gpu_temperature_celsius": (torch.cuda.temperature, 1),
    "gpu_power_watts": (torch.cuda.power_draw, 1e-3),
    "gpu_utilization_ratio": (torch.cuda.utilization, 1e-2),
    "gpu_memory_bytes": (torch.cuda.device_memory_used, 1),
}


def read_gpu(device: torch.device, names: tuple[str, ...] = tuple(READINGS)) -> dict[str, float]:
    """Those of READINGS that the device's driver tells; empty without a GPU."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        for name in names:
            read, factor = READINGS[name]
            # Not every GPU tells everything (a slice of one has no utilisation), nor is NVML wherever CUDA is.
            with contextlib.suppress(pynvml.NVMLError, RuntimeError, ImportError):
                found[name] = read(device) * factor
    return found


def gpu_temperature(device: torch.device) -> float | None:
    """Degrees Celsius; None where nobody knows."""
    return read_gpu(device, ("gpu_temperature_celsius",)).get("gpu_temperature_celsius")


class CoolDown:
    """Slows a training loop down while its GPU is hotter than `limit` (degrees Celsius).

    To be called every so many steps, by each process for its own device: `temperature` reads it.
    """

    def __init__(self, temperature: Callable[[], float | None], limit: float, rank: int = 0) -> None:
        self._temperature, self._limit, self._rank = temperature, limit, rank
        self._hot = False

    def __call__(self) -> float:
        """Sleep until the device is at the limit or below, or for LONGEST_PAUSE; returns the seconds slept.

        Warns once from the call that found it too hot to the one that finds it cool again.
        """
        slept, warned = 0.0, self._hot
        while True:
            degrees = self._temperature()
            self._hot = degrees is not None and degrees > self._limit
            if not self._hot or slept >= LONGEST_PAUSE:
                return slept
            if not warned:
                warned = True
                log.warning(
                    f"the GPU of rank {self._rank} has {degrees:.0f} °C, more than "
                    f"training.gpu_temperature_limit ({self._limit:.0f}); slowing down"
                )
            time.sleep(PAUSE)
            slept += PAUSE
