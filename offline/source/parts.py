"""Matrices in a model's files: where each lies, and reading it from there, in any thread of any process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vllm_milo.values import one_line

from ..errors import PassingError
from .formats.encoding import Encoded, Encoding, Place
from .formats.fused import EncodedExperts, FusedEncoding

Open = Callable[[Path], Any]
"""Returns a safetensors file, opened."""


Stored = torch.Tensor | Encoded
"""A matrix or tensor as files have it."""
StoredTensor = Stored | EncodedExperts
"""The same, or a tensor that holds matrices of all experts."""


class Part(NamedTuple):
    """A file, a tensor in it, and of fused experts the slice that is one matrix, which may be [K, N] there; how it is
    stored, if in fewer bits."""

    file: Path
    tensor: str
    expert: int | None = None
    rows: slice = slice(None)
    transposed: bool = False
    encoding: Encoding | None = None

    @property
    def place(self) -> str:
        """Return what errors call it."""
        return f"{self.file}: tensor {self.tensor}"


class Opened(threading.local):
    """The file that a thread has open."""

    def __init__(self) -> None:
        self._last: tuple[Path, Any] | None = None

    def shard(self, path: Path) -> Any:
        """Return a file, which stays open until another is wanted: thousands of tensors lie in one."""
        if self._last is None or self._last[0] != path:
            self._last = (path, safe_open(path, framework="pt"))
        return self._last[1]


opened = Opened()
"""Files that stay where they are while a conversion lasts."""


def read_part(part: Part, shard: Open = opened.shard) -> Stored:
    """Return a matrix or tensor as it is stored, on the CPU; of a tensor that holds several, no more is read.

    Args:
        part: where it lies.
        shard: opens its file.

    Raises:
        ConversionError: what is stored with fewer bits has scales or a shape that it cannot have.
        PassingError: it cannot be read.
    """
    if part.encoding is not None:
        return part.encoding.read(lambda place: _read_place(place, shard))
    if part.expert is None:
        return _read(Place(part.file, part.tensor), shard, lambda file: file.get_tensor(part.tensor))
    one = slice(part.expert, part.expert + 1)
    # files are sliced by ranges only: of rows that alternate with others, both are read
    every = part.rows.step not in (None, 1)
    rows = slice(None) if every else part.rows
    index = (one, slice(None), rows) if part.transposed else (one, rows)
    held = _read(Place(part.file, part.tensor), shard, lambda file: file.get_slice(part.tensor)[index][0])
    held = held.mT if part.transposed else held
    return (held[part.rows] if every else held).contiguous()


def read_whole(part: Part, encoding: Encoding | FusedEncoding | None, shard: Open = opened.shard) -> StoredTensor:
    """Return what :func:`read_part` does, or all experts of a tensor that is stored as ``encoding`` says."""
    if isinstance(encoding, FusedEncoding):
        return encoding.read(lambda place: _read_place(place, shard))
    return read_part(part, shard)


def on_device(stored: StoredTensor, device: torch.device) -> torch.Tensor:
    """Return a matrix or tensor on a device; one that is stored with fewer than 16 bits becomes values there."""
    return stored.to(device) if isinstance(stored, torch.Tensor) else stored.dequantize(device)


def _read_place(place: Place, shard: Open) -> torch.Tensor:
    """Return a tensor; of one that holds matrices of all experts one expert's rows, all else of it in one dimension."""
    if place.expert is None:
        return _read(place, shard, lambda file: file.get_tensor(place.tensor))
    one = slice(place.expert, place.expert + 1)
    held = _read(place, shard, lambda file: file.get_slice(place.tensor)[one][0])
    return held[place.rows].flatten(1).contiguous()


def _read(place: Place, shard: Open, get: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    try:
        return get(shard(place.file))
    except (OSError, SafetensorError) as error:
        raise PassingError(f"{place.file}: cannot read tensor {place.tensor}: {one_line(error)}") from error
