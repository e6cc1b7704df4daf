"""Compiles kernels beside other work, each distinct one once in a process.

Of the 0.7 s that a kernel takes, a thread holds Python's lock for about 0.3 s. A model takes nearly a hundred, so that
threads of the process that loads it would hold it up for half a minute: making its layers took 29 s where it takes 4.
So helpers compile what is new (:mod:`.helpers`), and the threads only load what these made.
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
from .known import remember

MOST_HELPERS = 8
"""Processes beside one that loads a model; each takes 0.3 GB of the host's memory for the seconds that it lives."""


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

    def helpers(self) -> int:
        """Return how many processes compile for this one: for all of its part of the cores but one, at most 8."""
        return max(1, min(MOST_HELPERS, usable_cores() // self.size - 1))

    def order(self, keys: Sequence[Hashable]) -> list[Hashable]:
        """Return all keys, those first that are this process's part."""
        start = len(keys) * self.rank // self.size
        return [*keys[start:], *keys[:start]]


class Compiler:
    """Has launches compiled in other processes, in as many threads as there are of these.

    Args:
        share: of this process.
    """

    def __init__(self, share: Share) -> None:
        self.share = share
        self._helpers = Helpers()
        self._pool = ThreadPoolExecutor(share.helpers(), thread_name_prefix="milo-compile")
        self._started: dict[Hashable, Future[float]] = {}

    def start(self, launches: Mapping[Hashable, Launch], device: torch.device) -> list[Future[float]]:
        """Begin to compile what was not begun before, and return what to wait for, for all of the launches.

        Args:
            launches: by their keys.
            device: of the kernels.
        """
        futures = []
        # tiles of many tokens take longest, and are noted last
        for key in self.share.order([*reversed(launches)]):
            place = device, key
            if place not in self._started:
                self._helpers.expect()
                self._started[place] = self._pool.submit(_compile, launches[key], device, self._helpers)
            futures.append(self._started[place])
        return futures


def _compile(launch: Launch, device: torch.device, helpers: Helpers) -> float:
    start = time.monotonic()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread's own
        helpers.compile(launch)
        launch.compile()
        remember(launch)
    return time.monotonic() - start
