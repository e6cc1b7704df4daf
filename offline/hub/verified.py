"""Marks of files of the Hub's cache that were compared with the Hub's SHA-256, so that it is done once.

A mark lies in the model's folder of the cache, and goes with it: ``.milo-verified/SHA256`` says what the file system
told of the file when it was read. A file that was written to or exchanged since then is read again, as is one whose
mark is damaged.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from ..durable.files import write_json

FOLDER = ".milo-verified"


def state_of(path: Path) -> list[int]:
    """Return a file's bytes and the times, in ns, at which its content and its entry in the file system last changed.

    Raises:
        OSError: there is no such file.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]  # unlike the second, the third cannot be set


def is_verified(model: Path, sha256: str, state: list[int]) -> bool:
    """Return whether a file in this state was found to have a SHA-256; ``model`` is its model's folder of the cache."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return False
    try:
        return _mark(model, sha256).read_text(encoding="utf-8") == json.dumps(state)
    except (OSError, ValueError):  # there is none, or it is no text: the file is read
        return False


def note_verified(model: Path, sha256: str, state: list[int]) -> None:
    """Note that a file in this state has a SHA-256, unless the cache may not be written to: it is then read again."""
    mark = _mark(model, sha256)
    with contextlib.suppress(OSError):
        mark.parent.mkdir(exist_ok=True)
        write_json(mark, state)


def _mark(model: Path, sha256: str) -> Path:
    return model / FOLDER / sha256
