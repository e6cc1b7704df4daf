"""The devices of a conversion: jobs are dealt to them, and results come back in the jobs' order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType

import torch

from .deal import Deal
from .job import Done, Job, solve
from .remote import Remote

AHEAD = 2
"""Jobs that a process has at most: one is solved while the next goes through the pipe."""


class Devices:
    """A context manager: the processes of further devices end with it.

    Args:
        devices: at least one. The first solves in this process and is where everything else of a conversion runs.

    Attributes:
        first: the first device.
        peak: the most bytes that solving took on a further device so far.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.first = devices[0]
        self.peak = 0
        self._remotes = [Remote(device) for device in devices[1:]]

    def __enter__(self) -> Devices:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for remote in self._remotes:
            remote.close()

    def solve(self, jobs: Iterator[Job]) -> Generator[Done, None, None]:
        """Yield what comes of jobs, in their order; must be used up or closed, and closed only at the end of all work.

        Which device solves a job makes no difference to its result where the devices are alike. Results lie on the
        first device, or are as they will be stored, on the CPU, where another has solved them.

        Raises:
            ConversionError: a matrix cannot be quantized, or a process has ended; all jobs before it were yielded.
        """
        if self._remotes:
            yield from self._dealt(jobs)
            return
        for job in jobs:
            done = [solve(job, self.first)]
            del job  # its memory is wanted for the next one
            yield done.pop()

    def _dealt(self, jobs: Iterator[Job]) -> Iterator[Done]:
        deal = Deal(jobs, AHEAD * len(self._remotes) + 1)
        threads = [threading.Thread(target=_serve, args=(deal, one), daemon=True) for one in self._remotes]
        for thread in threads:
            thread.start()
        try:
            while not deal.finished:
                done = deal.next_result(wait=False) or self._solve_here(deal) or deal.next_result(wait=True)
                if done is not None:
                    self.peak = max(self.peak, done.peak)
                    yield done
        finally:
            if not deal.finished:
                deal.close()
                for remote in self._remotes:
                    remote.end()  # a thread may wait for it
            for thread in threads:
                thread.join()

    def _solve_here(self, deal: Deal) -> Done | None:
        """Solve jobs here until the next result is there or there is nothing to solve; return that result."""
        done = None
        while done is None and (taken := deal.take(wait=False)) is not None:
            index, job = taken
            with deal.result_of(index) as put:
                put(solve(job, self.first))
            done = deal.next_result(wait=False)
        return done


def _serve(deal: Deal, remote: Remote) -> None:
    """Let a process solve jobs until there are no more."""
    held: deque[int] = deque()
    while True:
        while len(held) < AHEAD and (taken := deal.take(wait=not held)) is not None:
            index, job = taken
            with deal.result_of(index):
                remote.send(job)
                held.append(index)
            del taken, job
        if not held:
            return
        with deal.result_of(held.popleft()) as put:
            put(remote.receive())
