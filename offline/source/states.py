"""Where the hidden states of a whole text lie: on a device, on the host, or in a file without a name."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConversionError


@dataclass(frozen=True)
class StatesHome:
    """A place for hidden states.

    Attributes:
        device: where they lie in memory.
        folder: where they lie in a file instead, mapped into the host's memory, which the system empties as it needs
            room; None for memory. The file has no name, so it goes with the tensor or with the process.
    """

    device: torch.device
    folder: Path | None = None

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return room for hidden states of a shape, whose values are not set.

        Raises:
            ConversionError: the disk has no room for them.
        """
        if self.folder is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        size = torch.Size(shape).numel() * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a page that finds no room later would end the process
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise ConversionError(
                f"{self.folder}: the hidden states of the calibration text take {size / 2**30:.2f} GiB here, since the "
                f"host's memory is too small for them: {error}; free space, or use fewer --calibration-windows"
            ) from error
        return torch.frombuffer(mapped, dtype=dtype).view(shape)
