"""What is being compiled for layers that have not run yet: whoever runs the first one waits for it.

A load does not wait, but goes on to what else a server has to do before its first step, which takes longer. From that
step on nothing compiles any more: a kernel that came late would stand between requests, or into a recorded CUDA graph.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future

from ..launch import is_noting

logger = logging.getLogger("vllm.milo")

LINE = "MiLo's kernels are ready: %d, which took %.2f s of threads; the first step waited %.2f s for them"

pending: dict[int, Future[float]] = {}
"""What nobody has waited for yet, by identity."""


def add(futures: list[Future[float]]) -> None:
    """Note what has been begun."""
    pending.update((id(future), future) for future in futures)


def settle() -> None:
    """Wait for all that was begun, unless launches of this thread are only noted; raises what a compilation raised."""
    if not pending or is_noting():
        return
    start = time.monotonic()
    try:
        seconds = [future.result() for future in list(pending.values())]
    finally:
        pending.clear()  # not before: another thread may take a step too
    logger.info(LINE, len(seconds), sum(seconds), time.monotonic() - start)
