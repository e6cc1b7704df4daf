"""What every kernel benchmark shares: measured ceilings, roofs, how times are written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Ceilings(NamedTuple):
    """What the device was measured to do: bytes/s of a copy (read plus write), FLOP/s of a bf16 matmul."""

    copy_bandwidth: float
    matmul_flops: float


class Roof(NamedTuple):
    """The least time a call could take: seconds, and what bounds it (``memory`` or ``compute``)."""

    seconds: float
    bound: str


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure the copy bandwidth on buffers far larger than L2, and the bf16 matmul rate at 8192x8192x8192.

    On CPUs (dry runs only) both are small, and mean little.
    """
    cuda = device.type == "cuda"
    source = torch.empty(2**31 if cuda else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device, 20)
    size = 8192 if cuda else 256
    left = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    right = torch.randn_like(left)
    matmul = _median_seconds(lambda: left @ right, device, 10)
    return Ceilings(2 * source.numel() / copy, 2 * size**3 / matmul)


def _median_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    call()
    if device.type != "cuda":
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(events[i].elapsed_time(events[i + 1]) * 1e-3 for i in range(repeats))


def roof(num_bytes: float, flops: float, ceilings: Ceilings) -> Roof:
    """Return the floor of a call that moves ``num_bytes`` and computes ``flops``."""
    memory, compute = num_bytes / ceilings.copy_bandwidth, flops / ceilings.matmul_flops
    return Roof(memory, "memory") if memory >= compute else Roof(compute, "compute")


def microseconds(seconds: float) -> str:
    """Return a time for a table: three significant digits, whole numbers from 100 on."""
    value = seconds * 1e6
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"
