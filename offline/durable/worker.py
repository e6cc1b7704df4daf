"""One thread that puts things on the disk while the next ones are computed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

Job = Callable[[], None]


class Worker:
    """Does jobs one after the other in a thread of its own, which begins with the first.

    At most one job waits beside the one that is being done, so what jobs hold in memory is bounded: whoever hands over
    a third waits until the first is done. After a job that failed no other is done.

    Attributes:
        error: of the job that failed; None if none did.
        busy: seconds that jobs took so far.
        waited: seconds that others waited for it so far.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.busy = self.waited = 0.0

    def hand_over(self, job: Job) -> None:
        """Let a job be done after those before it.

        Raises:
            BaseException: what an earlier job raised; this one will not be done.
        """
        self._refuse_after_failure()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="milo-writer")
            self._thread.start()
        start = time.monotonic()
        self._jobs.put(job)
        self.waited += time.monotonic() - start

    def wait(self) -> None:
        """Return when all jobs are done.

        Raises:
            BaseException: what a job raised.
        """
        start = time.monotonic()
        self._jobs.join()
        self.waited += time.monotonic() - start
        self._refuse_after_failure()

    def close(self) -> None:
        """Do what was handed over, and end the thread; raises nothing, see ``error``."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _refuse_after_failure(self) -> None:
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            start = time.monotonic()
            try:
                if self.error is None:
                    job()
            except BaseException as error:  # it is raised where the next job is handed over
                self.error = error
            finally:
                self.busy += time.monotonic() - start
                del job  # what it holds may be large, and the next one may be long in coming
                self._jobs.task_done()
