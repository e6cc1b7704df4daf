"""Compiles kernels in threads beside other work, each distinct one once in a process.

Of the 0.7 s that a kernel takes, its thread holds Python's lock for about 0.3 s; the rest is mostly ``ptxas``, a
process of its own. Where other work is many small steps of Python for minutes, helpers compile (:mod:`.helpers`) and
the threads only load what these made; to start them takes seconds, which shorter work would not get back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import torch

from ..launch import Launch
from .helpers import Helpers

MOST_THREADS = 16
MOST_HELPERS = 4


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Share(NamedTuple):
    """Which of several like processes on a host this is: they share its cores, and begin at different kernels.

    What one of them has compiled the others find in Triton's cache on the disk.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def threads(self) -> int:
        """Return how many threads this process compiles in: its part of the cores that it may use, at most 16."""
        return max(1, min(MOST_THREADS, usable_cores() // self.size))

    def helpers(self) -> int:
        """Return how many processes compile for this one: for a quarter of its part of the cores, at most 4."""
        return max(1, min(MOST_HELPERS, usable_cores() // self.size // 4))

    def order(self, keys: Sequence[Hashable]) -> list[Hashable]:
        """Return all keys, those first that are this process's part."""
        start = len(keys) * self.rank // self.size
        return [*keys[start:], *keys[:start]]


class Compiler:
    """Compiles launches in threads.

    Args:
        share: of this process.
        apart: have each compiled in another process, whose result the thread loads.
    """

    def __init__(self, share: Share, apart: bool = False) -> None:
        self.share = share
        self._helpers = Helpers() if apart else None
        threads = share.helpers() if apart else share.threads()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="milo-compile")
        self._started: dict[Hashable, Future[float]] = {}

    def start(self, launches: Mapping[Hashable, Launch], device: torch.device) -> list[Future[float]]:
        """Begin to compile what was not begun before, and return what to wait for, for all of the launches.

        Args:
            launches: by their keys.
            device: of the kernels.
        """
        futures = []
        for key in self.share.order(list(launches)):
            place = device, key
            if place not in self._started:
                if self._helpers is not None:
                    self._helpers.expect()
                self._started[place] = self._pool.submit(_compile, launches[key], device, self._helpers)
            futures.append(self._started[place])
        return futures

    @property
    def number(self) -> int:
        """Kernels that were compiled, or are being, in this process."""
        return len(self._started)

    @property
    def seconds(self) -> float:
        """Seconds that threads have spent on those that are done, added up."""
        done = [future for future in self._started.values() if future.done() and not future.cancelled()]
        return sum(future.result() for future in done if future.exception() is None)


def _compile(launch: Launch, device: torch.device, helpers: Helpers | None) -> float:
    start = time.monotonic()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread's own
        if helpers is not None:
            helpers.compile(launch)
        launch.compile()
    return time.monotonic() - start
