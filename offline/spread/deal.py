"""Jobs that are dealt to several solvers, and their results, which leave in the jobs' order."""

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
        self._no_more = False

    @property
    def finished(self) -> bool:
        """Whether all jobs were taken, and their results too."""
        with self._changed:
            return self._no_more and self._yielded == self._taken

    def take(self, wait: bool) -> tuple[int, Job] | None:
        """Return the next job and its index; None if there are no more, or now none where nobody waits.

        What making a job raises counts as its result; of the main thread only errors do, interrupts pass.
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
            if threading.current_thread() is threading.main_thread() and not isinstance(error, Exception):
                raise
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

    def next_result(self, wait: bool) -> Done | None:
        """Return the next result in order; None if there will be none, or now is none and nobody waits.

        Raises:
            BaseException: the result is one.
        """
        with self._changed:
            while self._yielded not in self._results:
                if not wait or (self._no_more and self._yielded == self._taken):
                    return None
                self._changed.wait()
            result = self._results.pop(self._yielded)
            if isinstance(result, BaseException):
                raise result
            self._yielded += 1
            self._changed.notify_all()
            return result

    def close(self) -> None:
        """Hand out no more jobs."""
        with self._changed:
            self._no_more = True
            self._changed.notify_all()
