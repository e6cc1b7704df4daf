"""Times of calls in CUDA graphs, outputs that were left unwritten, and a budget of seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

MIN_REPLAYS, MAX_REPLAYS = 3, 200
CALLS_IN_GRAPH = 8
"""Calls captured in one graph, each with its own input, routing and (where they would stay in L2) weights."""


class BadOutputError(RuntimeError):
    """A call left part of its output unwritten, or wrote NaN, infinities or only zeros."""


class Timing(NamedTuple):
    """Seconds of one call: median and minimum over ``replays`` of all calls together, divided by the calls."""

    median: float
    minimum: float
    replays: int


class Budget:
    """Wall-clock seconds a run may take; points that would start after them are skipped."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def spent(self) -> bool:
        """Tell whether the time is up."""
        return self.left() < 0

    def left(self) -> float:
        """Return the seconds left; negative when the time is up."""
        return self.deadline - time.monotonic()


def time_calls(
    calls: Sequence[Callable[[], torch.Tensor]], device: torch.device, seconds: float
) -> tuple[Timing, list[torch.Tensor]]:
    """Time calls that follow each other, in one CUDA graph on GPUs.

    The outputs are filled with NaN before a last run, so that what it leaves unwritten is seen.

    Args:
        calls: the calls; each returns a tensor of its own.
        device: where they run.
        seconds: about how long to measure.

    Returns:
        The timing of one call, and the calls' outputs.

    Raises:
        BadOutputError: an output is not finite, or all zeros.
    """
    if device.type == "cuda":
        return _time_graph(calls, seconds)
    outputs = [call() for call in calls]
    check_outputs(outputs)
    samples: list[float] = []
    deadline = time.monotonic() + seconds
    while len(samples) < MIN_REPLAYS or (time.monotonic() < deadline and len(samples) < MAX_REPLAYS):
        start = time.perf_counter()
        for call in calls:
            call()
        samples.append(time.perf_counter() - start)
    return _timing(samples, len(calls)), outputs


def _time_graph(calls: Sequence[Callable[[], torch.Tensor]], seconds: float) -> tuple[Timing, list[torch.Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills caches that a capture may not fill
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    for output in outputs:
        output.fill_(float("nan"))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(MAX_REPLAYS + 1)]
    events[0].record()
    graph.replay()
    events[1].record()
    torch.cuda.synchronize()
    check_outputs(outputs)
    first = max(events[0].elapsed_time(events[1]) * 1e-3, 1e-6)
    replays = max(MIN_REPLAYS, min(MAX_REPLAYS, round(seconds / first)))
    events[0].record()
    for event in events[1 : replays + 1]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    samples = [events[i].elapsed_time(events[i + 1]) * 1e-3 for i in range(replays)]
    kept = [output.clone() for output in outputs]
    del graph, outputs
    return _timing(samples, len(calls)), kept


def check_outputs(outputs: Sequence[torch.Tensor]) -> None:
    """Refuse outputs with NaN, infinities or nothing but zeros.

    Raises:
        BadOutputError: naming the call and what is wrong.
    """
    for index, output in enumerate(outputs):
        bad = int((~torch.isfinite(output)).sum())
        if bad:
            raise BadOutputError(f"call {index}: {bad} of {output.numel()} output values are not finite")
        if not bool(output.any()):
            raise BadOutputError(f"call {index}: all {output.numel()} output values are zero")


def _timing(samples: Sequence[float], calls: int) -> Timing:
    return Timing(statistics.median(samples) / calls, min(samples) / calls, len(samples))


def l2_bytes(device: torch.device) -> int:
    """Return the size of the device's L2 cache; 0 on CPUs, where nothing is rotated."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def error_text(error: BaseException) -> str:
    """Return an error for the record: its type, and the first 2000 characters."""
    return f"{type(error).__name__}: {error}"[:2000]
