"""Jobs that are dealt to several solvers, and their results, which leave in the jobs' order.

One of the solvers is the thread that wants the results, for which another reads ahead.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from .job import Done, Job


class Deal:
    """What several threads share: jobs that wait to be taken, and results that wait for their turn.

    Args:
        jobs: made one at a time, in whatever thread wants one.
        most: jobs that may have been taken and not yielded; it bounds the memory that they take.
    """

    def __init__(self, jobs: Iterator[Job], most: int) -> None:
        self._jobs, self._most = jobs, most
        self._making = threading.Lock()
        self._changed = threading.Condition()
        self._results: dict[int, Done | BaseException] = {}
        self._taken = self._yielded = 0
        self._no_more = self._closed = False
        self._read: tuple[int, Job] | None = None

    @property
    def finished(self) -> bool:
        """Whether all jobs were taken, and their results too."""
        with self._changed:
            return self._finished

    @property
    def _finished(self) -> bool:
        return self._no_more and self._yielded == self._taken

    def take(self, wait: bool) -> tuple[int, Job] | None:
        """Return the next job and its index; None if there are no more, or now none where nobody waits.

        What making a job raises counts as its result.
        """
        while self._has_room(wait):  # before the lock, which others want who do not wait
            with self._making:
                if self._has_room(wait=False):
                    return self._make()
        return None

    def _has_room(self, wait: bool) -> bool:
        """Return whether a job may be taken now, or when it may; False where there are no more."""
        with self._changed:
            while not self._no_more:
                if self._taken - self._yielded < self._most:
                    return True
                if not wait:
                    return False
                self._changed.wait()
            return False

    def _make(self) -> tuple[int, Job] | None:
        index = self._taken
        try:
            job = next(self._jobs, None)
        except BaseException as error:
            self._taken += 1
            self._put(index, error)
            return None
        with self._changed:
            self._no_more |= job is None
            self._taken += job is not None
            self._changed.notify_all()
        return None if job is None else (index, job)

    @contextlib.contextmanager
    def result_of(self, index: int) -> Iterator[Callable[[Done], None]]:
        """Take a job's result by what this yields, or as one what the block raises; interrupts pass."""
        try:
            yield lambda done: self._put(index, done)
        except Exception as error:
            self._put(index, error)

    def _put(self, index: int, result: Done | BaseException) -> None:
        with self._changed:
            self._results[index] = result
            self._no_more |= isinstance(result, BaseException)  # what comes after a failure is not wanted
            self._changed.notify_all()

    def read_ahead(self, pinned: bool) -> None:
        """Read jobs for who wants the results: each when the one before it was fetched, until there are no more.

        Args:
            pinned: see :meth:`.Job.read`.
        """
        while self._wants_another() and (taken := self.take(wait=True)) is not None:
            index, job = taken
            with self.result_of(index):
                read = job.read(pinned)
                with self._changed:
                    self._read = index, read
                    self._changed.notify_all()
            del taken, job

    def _wants_another(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._read is None or self._closed)
            return not self._closed

    def fetch(self) -> Done | tuple[int, Job] | None:
        """Return the next result if it is there, else a job that was read, whichever comes first; None at the end.

        Raises:
            BaseException: the result is one.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._yielded in self._results or self._read is not None or self._finished)
            got: Done | tuple[int, Job] | None = None
            if self._yielded in self._results:
                result = self._results.pop(self._yielded)
                if isinstance(result, BaseException):
                    raise result
                self._yielded += 1
                got = result
            elif self._read is not None:
                got, self._read = self._read, None
            self._changed.notify_all()
            return got

    def close(self) -> None:
        """Hand out no more jobs."""
        with self._changed:
            self._no_more = self._closed = True
            self._read = None
            self._changed.notify_all()
