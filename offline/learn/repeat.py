"""Calls a training step again and again, on a GPU as a CUDA graph: a step is a thousand short launches otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger("vllm.milo")

WARM_UP = 3
"""Calls before the step is captured: what libraries set up at first use must not be in the graph."""


class Repeat:
    """A step that reads and writes the same tensors in each call.

    Args:
        step: does everything on one device, with the same shapes each time, and waits for nothing on the host.
        device: where it runs; on CPUs it is just called.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False

    def __call__(self) -> None:
        """Do one step."""
        self._calls += 1
        if self._device.type != "cuda":
            self._step()
        elif self._calls <= WARM_UP:
            self._call_aside()
        else:
            if self._graph is None and not self._capture():
                self._step()
                return
            assert self._graph is not None
            self._graph.replay()

    def _capture(self) -> bool:
        """Capture the step, once; return whether that went well."""
        if self._failed:
            return False
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        try:
            # threads that read the next layer may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:  # a layer that waits for the host: it runs, but slowly
            self._failed = True
            _leave_failed_capture(stream)
            logger.warning("a training step cannot be captured and runs launch by launch: %s", error)
            return False
        self._graph = graph
        return True

    def _call_aside(self) -> None:
        """Call the step on a stream of its own, as capture wants of what comes before it."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream(self._device).wait_stream(stream)


def _leave_failed_capture(stream: torch.cuda.Stream) -> None:
    """Go back to a stream, and give its device's random numbers a state again that is not being captured.

    ``torch.cuda.graph`` leaves both as they were within, where the end of a capture raises.
    """
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device.index]
    generator.graphsafe_set_state(generator.clone_state())
