"""Objects with tensors through a pipe between two processes of this program; tensors arrive on the CPU.

Tensors go as they lie in memory, beside the pickle of the rest: shared memory would be faster, but containers often
have 64 MiB of it.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch

_LENGTH = struct.Struct("<Q")


class _Pickler(pickle.Pickler):
    """Leaves the bytes of tensors to the buffers beside the pickle."""

    def reducer_override(self, value: Any) -> Any:
        """Return how a tensor is made again; leave everything else to pickle."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return _tensor, (pickle.PickleBuffer(flat.numpy().data), value.dtype, tuple(value.shape))


def _tensor(content: bytearray | bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    if not len(content):
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(tuple(shape))


def send(file: BinaryIO, value: Any) -> None:
    """Write an object.

    Raises:
        OSError: the other end is closed.
    """
    buffers: list[pickle.PickleBuffer] = []
    content = io.BytesIO()
    _Pickler(content, protocol=5, buffer_callback=buffers.append).dump(value)
    parts: list[bytes | memoryview] = [_LENGTH.pack(len(buffers)), content.getbuffer()]
    for part in (*parts, *(buffer.raw() for buffer in buffers)):
        file.write(_LENGTH.pack(len(part)))
        file.write(part)
    file.flush()


def receive(file: BinaryIO) -> Any:
    """Read an object that :func:`send` wrote.

    Raises:
        EOFError: the other end is closed.
    """
    (number,) = _LENGTH.unpack(_part(file))
    content = _part(file)
    return pickle.loads(content, buffers=[_part(file) for _ in range(number)])


def _part(file: BinaryIO) -> bytearray:
    (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size))
    return _exactly(file, length)


def _exactly(file: BinaryIO, length: int) -> bytearray:
    content = bytearray(length)
    view, got = memoryview(content), 0
    while got < length:
        read = file.readinto(view[got:])  # type: ignore[attr-defined]
        if not read:
            raise EOFError("the other process closed the pipe")
        got += read
    return content
