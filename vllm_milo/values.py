"""Values that a stranger's file may hold: checked before anything relies on them, short in messages. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_SHOWN = 60
_DEEPEST = 100
"""Lists and objects within each other that no settings have: Python's own recursion ends at some hundreds."""


class CheckpointError(ValueError):
    """A checkpoint, or its ``quantization_config``, breaks the format; the message names what and where."""


def shown(value: object) -> str:
    """Return a value as one line of text for a message: escaped, and cut where it is long."""
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def shown_name(name: str) -> str:
    """Return a name for a message: as it is, unless it is long or would not print as one line."""
    return name if name.isprintable() and len(name) <= 3 * _SHOWN else shown(name)


def one_line(error: BaseException) -> str:
    """Return what an exception of a library says, as one line, cut where it is long."""
    text = " ".join(str(error).split())
    text = text if text.isprintable() else ascii(text)[1:-1]
    return (text if len(text) <= 5 * _SHOWN else f"{text[: 5 * _SHOWN]} …") or type(error).__name__


def size_text(size: int) -> str:
    """Return a number of bytes as text, in GiB or, where it is small, in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def require_object(where: str, value: object, of: str = "") -> None:
    """Raise CheckpointError unless a value of ``quantization_config`` is an object.

    Args:
        where: the value is there, as messages name it.
        value: what config.json has.
        of: what the object holds, as messages name it.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(f"quantization_config{where} must be an object{of}, found {shown(value)}")


def object_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object of ``quantization_config``; an empty one where it is missing or null.

    Raises:
        CheckpointError: it is no object.
    """
    value = config.get(key)
    if value is not None:
        require_object(f": {key}", value)
    return value or {}


def require_int(
    config: Mapping[str, Any], key: str, low: int, high: int, error: Callable[[str], Exception]
) -> int | None:
    """Return a whole number of a JSON object; None where it is missing or null.

    Args:
        config: the object.
        key: of the number.
        low: the least that it may be.
        high: the most that it may be.
        error: makes the exception of a message about the key.

    Raises:
        Exception: what ``error`` makes, where the value is no whole number or lies outside the bounds.
    """
    value = config.get(key)
    if value is None or (type(value) is int and low <= value <= high):
        return value
    what = f"from {low} to {high}" if type(value) is int else ""
    raise error(f"{key} is {shown(value)}, but must be a whole number {what}".rstrip())


def is_deep(content: object) -> bool:
    """Return whether JSON has more lists and objects within each other than settings have."""
    level = [content]
    for _ in range(_DEEPEST):
        inner: list[object] = []
        for value in level:
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            inner += (one for one in held if isinstance(one, dict | list))
        if not inner:
            return False
        level = inner
    return True
