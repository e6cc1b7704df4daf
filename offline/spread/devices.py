"""The devices of a conversion: jobs are dealt to them, and results come back in the jobs' order."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any

import torch

from .ahead import ahead
from .deal import Deal
from .job import Done, Job, Spent, solve
from .remote import Remote

AHEAD = 2
"""Jobs that a process has at most: one is solved while the next is read or goes through the pipe."""


class Devices:
    """A context manager: the processes of further devices begin with it, since they take seconds, and end with it.

    Args:
        devices: at least one. The first solves in this process and is where everything else of a conversion runs.

    Attributes:
        all: of them.
        first: the first device.
        peak: the most bytes that solving took on a further device so far.
        spent: seconds that each device took so far.
        waited: seconds in which nothing could be solved here, since no job was read and no result was there.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.all = list(devices)
        self.first = devices[0]
        self.peak = 0
        self.spent: dict[torch.device, Spent] = defaultdict(Spent)
        self.waited = 0.0
        self._remotes = [Remote(device) for device in devices[1:]]

    def __enter__(self) -> Devices:
        for remote in self._remotes:
            remote.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for remote in self._remotes:
            remote.close()

    @property
    def seconds(self) -> dict[str, Any]:
        """Return the seconds so far of reading weights, of solving by device, and of waiting for either here."""
        return {
            "reading": sum(spent.reading for spent in self.spent.values()),
            "solving": {str(device): spent.solving for device, spent in self.spent.items()},
            "waiting_for_jobs": self.waited,
        }

    def solve(self, jobs: Iterator[Job], reading: bool = False) -> Generator[Done, None, None]:
        """Yield what comes of jobs, in their order; must be used up or closed, and closed only at the end of all work.

        Which device solves a job makes no difference to its result where the devices are alike. Results lie on the
        first device, or are as they will be stored, on the CPU, where another has solved them.

        Args:
            jobs: what is solved.
            reading: whether their weights have to be read, which is done for the next job while one is solved.

        Raises:
            ConversionError: a matrix cannot be quantized, or a process has ended; all jobs before it were yielded.
        """
        if self._remotes:
            source = ahead(jobs) if reading else (job for job in jobs)
            results = self._dealt(source)
        else:
            pinned = self.first.type == "cuda"
            source = ahead(job.read(pinned) for job in jobs) if reading else (job for job in jobs)
            results = self._alone(source)
        with closing(source), closing(results):
            for done in results:
                self.peak = max(self.peak, done.peak)
                before = self.spent[done.device]
                self.spent[done.device] = Spent(*map(sum, zip(before, done.spent, strict=True)))
                yield done

    def _alone(self, jobs: Iterator[Job]) -> Generator[Done, None, None]:
        while True:
            start = time.monotonic()
            job = next(jobs, None)
            self.waited += time.monotonic() - start
            if job is None:
                return
            done = [solve(job, self.first)]
            del job  # its memory is wanted for the next one
            yield done.pop()

    def _dealt(self, jobs: Iterator[Job]) -> Generator[Done, None, None]:
        deal = Deal(jobs, (AHEAD + 1) * (len(self._remotes) + 1))
        threads = [threading.Thread(target=_serve, args=(deal, one), daemon=True) for one in self._remotes]
        arguments = (self.first.type == "cuda",)
        threads.append(threading.Thread(target=deal.read_ahead, args=arguments, name="_serve here", daemon=True))
        for thread in threads:
            thread.start()
        try:
            while True:
                start = time.monotonic()
                got = deal.fetch()
                self.waited += time.monotonic() - start
                if got is None:
                    return
                if isinstance(got, Done):
                    yield got
                    continue
                index, job = got
                with deal.result_of(index) as put:
                    put(solve(job, self.first))
                del got, job
        finally:
            finished = deal.finished
            deal.close()
            if not finished:
                for remote in self._remotes:
                    remote.end()  # a thread may wait for it
            for thread in threads:
                thread.join()


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
