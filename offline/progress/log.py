"""What a conversion does as JSON lines, for machines: one object a line, appended and flushed as it happens."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConversionError

_LONGEST_EVENT = 2**24
"""Bytes of the first line of a log, at most."""
_active: ContextVar[EventLog | None] = ContextVar("event_log", default=None)


class EventLog:
    """A file of events. Each has ``time``, seconds since 1970, and ``event``, its kind.

    A log that can no longer be written says so once and falls silent: no conversion is lost for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        if path.is_file() and not _is_log(path):
            raise ConversionError(f"--log-json {path}: exists and is no such log, so it is kept; name another file")
        try:
            self._file: TextIO | None = os.fdopen(_open_at_once(path), "a", encoding="utf-8")
        except OSError as error:
            raise ConversionError(
                f"--log-json {path}: cannot be written: {error.strerror}; name another file"
            ) from error

    def write(self, event: str, **said: Any) -> None:
        """Append one event with what there is to say of it, which must be JSON or have a text."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **said}, default=str)
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                print(f"warning: --log-json {self._path}: {error.strerror}; the log ends here", file=sys.stderr)
                with contextlib.suppress(OSError):  # the same again, of what is still to be written
                    self._stop()

    def close(self) -> None:
        """End the log."""
        with self._lock:
            try:
                self._stop()
            except OSError as error:
                print(f"warning: --log-json {self._path}: {error.strerror}", file=sys.stderr)

    def _stop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _is_log(path: Path) -> bool:
    """Return whether a file is empty or begins with an event."""
    try:
        with path.open("rb") as file:
            line = file.readline(_LONGEST_EVENT)
        found = json.loads(line) if line else {"event": None}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "event" in found


def _open_at_once(path: Path) -> int:
    """Open a file to append to it, without waiting for a reader, which a pipe may never get."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    os.set_blocking(file, True)
    return file


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """Let what runs inside write its events to a file; None for nowhere. What it raises is the last event.

    Raises:
        ConversionError: the file cannot be opened for appending.
    """
    if path is None:
        yield
        return
    log = EventLog(path)
    token = _active.set(log)
    try:
        yield
    except BaseException as error:
        notes = list(getattr(error, "__notes__", ()))
        log.write("error", kind=type(error).__name__, message=str(error), notes=notes)
        raise
    finally:
        _active.reset(token)
        log.close()


def active_log() -> EventLog | None:
    """Return where events are written, or None."""
    return _active.get()


def log_event(event: str, **said: Any) -> None:
    """Write one event where events are recorded; see :meth:`EventLog.write`."""
    log = _active.get()
    if log is not None:
        log.write(event, **said)
