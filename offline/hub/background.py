"""Work with the Hub in threads that can be left: what is wanted of a name, for one name after the other."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from ..errors import PassingError
from .patience import Patience

LEAVE = 5.0
"""Seconds that the end waits for work to notice it."""

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Does something for names, in the order that they are asked for.

    Threads are daemons: a library that does not let itself be stopped must not hold up the end of the process.

    Args:
        do: for a name; is handed an event that says when nobody wants the result any more.
        threads: at most, one for each name that waits.
    """

    def __init__(self, do: Callable[[str, threading.Event], Result], threads: int = 1) -> None:
        self._do = do
        self._most = threads
        self._asked: queue.SimpleQueue[tuple[str, Future[Result]] | None] = queue.SimpleQueue()
        self._waiting: list[Future[Result]] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def begin(self, name: str) -> Future[Result]:
        """Return what will be the result for a name."""
        came: Future[Result] = Future()
        with self._lock:
            if self._ended.is_set():
                came.set_exception(PassingError(f"{name}: is not downloaded, since the conversion ends"))
                return came
            self._waiting.append(came)
            self._asked.put((name, came))
            if len(self._threads) < min(self._most, len(self._waiting)):
                self._threads.append(threading.Thread(target=self._work, name="milo-download", daemon=True))
                self._threads[-1].start()
        return came

    def stop(self) -> None:
        """Let nobody wait any more, and the work that runs end soon."""
        with self._lock:
            self._ended.set()
            for _ in self._threads:
                self._asked.put(None)
            for came in self._waiting:
                came.set_exception(PassingError("a download was stopped, since the conversion ends"))
            self._waiting.clear()

    def close(self) -> None:
        """Stop, and wait a while for the threads."""
        self.stop()
        for thread in self._threads:
            thread.join(LEAVE / len(self._threads))

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None and not self._ended.is_set():
            name, came = asked
            result: Result | None = None
            error: BaseException | None = None
            try:
                result = self._do(name, self._ended)
            except BaseException as raised:  # it is raised where the result is wanted
                error = raised
            with self._lock:
                if came not in self._waiting:
                    continue  # stopped
                self._waiting.remove(came)
                if error is not None:
                    came.set_exception(error)
                else:
                    came.set_result(result)  # type: ignore[arg-type]


def in_background(do: Callable[[], Result], patience: Patience) -> Result:
    """Return what something makes that asks the Hub; raises what it raises, and PassingError when patience ends."""
    return next(each([""], lambda _, __: do(), 1, patience))


def each(
    names: Sequence[str], do: Callable[[str, threading.Event], Result], threads: int, patience: Patience
) -> Iterator[Result]:
    """Yield what is made for each name, in order; nothing is begun after an error.

    Raises:
        PassingError: patience ended.
    """
    work = Background(do, threads)
    with contextlib.ExitStack() as stack:
        stack.callback(work.stop)
        for came in [work.begin(name) for name in names]:
            yield patience.wait(came)
