"""The next item is made in a thread while this one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class _Made(NamedTuple, Generic[Item]):
    """An item, an error in its place, or neither at the end."""

    items: list[Item]
    error: BaseException | None = None


def ahead(items: Iterable[Item]) -> Generator[Item, None, None]:
    """Yield ``items``, each made while the one before it is used: at most one waits, and none is made beside it.

    What making an item raises is raised in its place, after those before it. The thread ends with this generator, which
    must be used up or closed.
    """
    made: queue.SimpleQueue[_Made[Item]] = queue.SimpleQueue()
    room, ended = threading.Semaphore(1), threading.Event()
    arguments = (iter(items), made, room, ended)
    thread = threading.Thread(target=_make, args=arguments, name="milo-reader", daemon=True)
    thread.start()
    try:
        while True:
            next_one = made.get()
            if next_one.error is not None:
                raise next_one.error
            if not next_one.items:
                return
            room.release()
            yield next_one.items.pop()
    finally:
        ended.set()
        room.release()
        thread.join()


def _make(
    items: Iterator[Item], made: queue.SimpleQueue[_Made[Item]], room: threading.Semaphore, ended: threading.Event
) -> None:
    """Put items into ``made``, each when there is room, until they or their user end."""
    with closing(items) if isinstance(items, Generator) else nullcontext():
        while room.acquire() and not ended.is_set():
            try:
                made.put(_Made([next(items)]))
            except StopIteration:
                made.put(_Made([]))
                return
            except BaseException as error:  # raised where the item is wanted
                made.put(_Made([], error))
                return
