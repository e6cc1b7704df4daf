"""Signals that wait: what must not be left half done is short."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_WAITING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect at the end of the block.

    Handlers are exchanged, since a mask would hold for this thread alone while torch's threads take the signal. Python
    runs handlers in its main thread only, so in another there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _WAITING}
    try:
        yield
    finally:
        for waiting, handler in before.items():
            signal.signal(waiting, signal.SIG_DFL if handler is None else handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)
