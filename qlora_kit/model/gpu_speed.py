"""Measure the two rates of this machine's GPU that the prediction of time goes by, in about two seconds."""

import time
from collections.abc import Callable

import torch

from qlora_kit.planning.cards import Card

SECONDS = 0.5  # of each measurement, after as much warming up
# What the probes reach of the rates that NVIDIA states for an H100, by which planning/time.py was fitted (2026-11-27).
MATRIX_PROBE, MEMORY_PROBE = 0.66, 0.88


def measure_gpu() -> Card:
    """Return the GPU as a card: its rates are those that NVIDIA would state for one that measures the same."""
    properties = torch.cuda.get_device_properties(0)
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    size = 4096
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    b, product = torch.randn_like(a), torch.empty_like(a)
    flops = 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=product))
    source = torch.empty(2**28, device="cuda", dtype=torch.uint8)  # larger than any cache
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / _seconds(lambda: target.copy_(source))
    return Card(properties.name, properties.total_memory, flops / MATRIX_PROBE, bandwidth / MEMORY_PROBE)


def _seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call on the GPU, without its start."""
    for _ in range(2):  # the first round warms up: clocks rise and kernels are chosen
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < SECONDS:
            for _ in range(8):
                call()
            torch.cuda.synchronize()
            count += 8
        seconds = (time.perf_counter() - begun) / count
    return seconds
