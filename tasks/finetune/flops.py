"""Floating-point operations: those of a trained token, and a device's peak. They give the MFU.

Model FLOPs utilisation is (tokens per second x operations per token) / (processes x peak of one): the fraction of the
hardware's peak that the model's own arithmetic uses, without recomputed activations
(PaLM, appendix B, https://arxiv.org/abs/2204.02311).
"""

import time

import torch

# Dense bf16 operations per second, from NVIDIA's data sheets. The first key contained in the device's name applies.
PEAKS = {
    "A100": 312e12,  # https://www.nvidia.com/en-us/data-center/a100/
    "H100 PCIe": 756e12,  # https://www.nvidia.com/en-us/data-center/h100/
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,  # https://www.nvidia.com/en-us/data-center/h200/
    "H200": 989e12,
}
MEASURE_SECONDS = 0.15


def flops_per_token(trained: int, frozen: int, layers: int, hidden: int, context: int) -> float:
    """Operations per token in training, forward and backward.

    `trained` and `frozen` are parameters outside the embedding tables; `hidden` is heads x head size; `context` is
    the length of a packed row. A trained weight costs 6 (2 forward, 2 for the gradient of its input, 2 for its own), a
    frozen one below an adapter 4, and attention 12 x layers x hidden x context, ignoring its mask (PaLM, appendix B).
    """
    return 6.0 * trained + 4.0 * frozen + 12.0 * layers * hidden * context


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak operations per second of one process's device.

    For bf16 on a GPU in PEAKS, the data sheet's. Otherwise it is measured, so that the MFU is relative to what a large
    square matrix product reaches on this machine.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak
    return measure_flops(device, dtype)


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest square matrix product within MEASURE_SECONDS."""
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    product = torch.empty_like(matrix)
    fastest = float("inf")
    torch.mm(matrix, matrix, out=product)  # the first one also initialises the library
    _wait(device)
    end = time.perf_counter() + MEASURE_SECONDS
    while fastest == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        _wait(device)
        fastest = min(fastest, max(time.perf_counter() - started, 1e-9))
    return 2.0 * size**3 / fastest


def _wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
