"""How much of a model is solved at once, by the memory that there is.

The solver's results may depend on which matrices it gets together: on GPUs cuBLAS chooses how it adds up by the size of
a batch. So memory decides in steps of two only, the same for all devices, and a conversion that goes on keeps to what
the interrupted one began with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..batches import batch_elements
from ..calibration import memory
from ..errors import ConversionError
from ..nouns import Matrix


def solver_weights(devices: Sequence[torch.device], limit: int | None) -> int:
    """Return the most weights that the solver gets at once: all that it has use for, or a half, a fourth, … of that.

    Args:
        devices: where it runs.
        limit: bytes that it may take on each, or None for what is free; on CPUs that is taken to suffice.
    """
    elements = batch_elements(devices[0])
    have = _room(devices, limit)
    while have is not None and elements > 1 and memory.solver_need(elements) > have:
        elements //= 2
    return elements


def refuse_large_matrices(matrices: Sequence[Matrix], devices: Sequence[torch.device], limit: int | None) -> None:
    """Raise where a device has too little memory for the largest matrix by itself.

    Raises:
        ConversionError: names the matrix, what it needs and what there is.
    """
    have, largest = _room(devices, limit), max(matrices, key=lambda matrix: matrix.n * matrix.k)
    need = memory.solver_need(largest.n * largest.k)
    if have is None or need <= have:
        return
    names = ", ".join(map(str, devices))
    free = f"{memory.gib(have)} are free on {names}" if limit is None or have < limit else None
    raise ConversionError(
        f"{largest.name}: quantizing its [{largest.n}, {largest.k}] weights takes {memory.gib(need)} of memory, and "
        f"{free or f'--device-memory allows {memory.gib(have)}'}; {'free some' if free else 'allow more'}, use another "
        f"device, or keep this layer unquantized (--ignore)"
    )


def _room(devices: Sequence[torch.device], limit: int | None) -> int | None:
    """Return the bytes that every device has for the solver; None where nobody asks."""
    if limit is None and devices[0].type == "cpu":
        return None
    return min(memory.room(str(device), limit) for device in devices)
