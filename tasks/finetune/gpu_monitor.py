"""A process's GPU as NVML reports it: temperature, power, utilisation and memory; and pauses if it is too hot."""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import pynvml  # type: ignore[import-untyped]
import torch

log = logging.getLogger(__name__)

PAUSE = 1.0  # seconds between readings of a GPU that is too hot
MAX_PAUSE = 30.0  # seconds; then training continues until the next call


class Reading(NamedTuple):
    """A value that the driver reports, and the factor to the unit in its name."""

    read: Callable[[torch.device], float]
    factor: float
    description: str


READINGS = {
    "gpu_temperature_celsius": Reading(torch.cuda.temperature, 1, "GPU temperature"),
    "gpu_power_watts": Reading(torch.cuda.power_draw, 1e-3, "GPU power draw"),
    "gpu_utilization_ratio": Reading(torch.cuda.utilization, 1e-2, "Fraction of the time in which the GPU was busy"),
    "gpu_memory_bytes": Reading(torch.cuda.device_memory_used, 1, "GPU memory in use, by all processes"),
}


def read_gpu(device: torch.device, names: tuple[str, ...] = tuple(READINGS)) -> dict[str, float]:
    """The READINGS that the device's driver reports; empty without a GPU."""
    values: dict[str, float] = {}
    if device.type == "cuda":
        for name in names:
            reading = READINGS[name]
            # Not every GPU reports everything (a MIG slice has no utilisation), and NVML may be missing.
            with contextlib.suppress(pynvml.NVMLError, RuntimeError, ImportError):
                values[name] = reading.read(device) * reading.factor
    return values


def gpu_temperature(device: torch.device) -> float | None:
    """Degrees Celsius; None if unknown."""
    return read_gpu(device, ("gpu_temperature_celsius",)).get("gpu_temperature_celsius")


class CoolDown:
    """Slows a training loop down while its GPU is hotter than `limit` (degrees Celsius).

    Each process calls it regularly for its own device, whose temperature the function `temperature` reads.
    """

    def __init__(self, temperature: Callable[[], float | None], limit: float, rank: int = 0) -> None:
        self._temperature, self._limit, self._rank = temperature, limit, rank
        self._hot = False

    def __call__(self) -> float:
        """Sleep until the device is no hotter than the limit, at most MAX_PAUSE; returns the seconds slept.

        Warns once until the device has cooled down.
        """
        slept, warned = 0.0, self._hot
        while True:
            degrees = self._temperature()
            self._hot = degrees is not None and degrees > self._limit
            if not self._hot or slept >= MAX_PAUSE:
                return slept
            if not warned:
                warned = True
                log.warning(
                    f"the GPU of rank {self._rank} has {degrees:.0f} °C, more than "
                    f"training.gpu_temperature_limit ({self._limit:.0f}); slowing down"
                )
            time.sleep(PAUSE)
            slept += PAUSE
