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

Open = Callable[[Path], Any]
"""Returns a safetensors file, opened."""


class Part(NamedTuple):
    """A file, a tensor in it, and of fused experts the slice that is one matrix, which may be [K, N] there."""

    file: Path
    tensor: str
    expert: int | None = None
    rows: slice = slice(None)
    transposed: bool = False

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


def read_part(part: Part, shard: Open = opened.shard) -> torch.Tensor:
    """Return a matrix or tensor as it is stored, on the CPU; of a tensor that holds several, no more is read.

    Args:
        part: where it lies.
        shard: opens its file.

    Raises:
        PassingError: it cannot be read.
    """
    try:
        if part.expert is None:
            return shard(part.file).get_tensor(part.tensor)
        held = shard(part.file).get_slice(part.tensor)
        if part.transposed:
            return held[part.expert : part.expert + 1, :, part.rows][0].mT.contiguous()
        return held[part.expert : part.expert + 1, part.rows][0]
    except (OSError, SafetensorError) as error:
        raise PassingError(f"{part.file}: cannot read tensor {part.tensor}: {one_line(error)}") from error
