"""Which dense layers a server keeps in 16 bits, compensators added: where there is room, since that is quicker.

Attention and shared experts are a few percent of a MoE model's weights, but each token reads all of theirs, and large
ranks are multiplied beside them. In 16 bits a layer is one product of a library, and in 8 bits, which Triton's kernels
read for few tokens, half of the bytes. The checkpoint stays as it is; what is added on the device is bounded by
:data:`SHARE`, and nothing is added where weights fill it (:data:`FULL`).

vLLM keeps compiled graphs from start to start, and those of both kinds differ: layers in 16 bits are noted in the part
of vLLM's configuration that tells graphs apart and is open to plugins.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from vllm_milo import compat
from vllm_milo.kernels import ops
from vllm_milo.kernels.serving.dense.codes import MOST_ERROR, code_bytes

VARIABLE = "VLLM_MILO_DENSE"
AUTO, PACKED, WIDE, CODED = "auto", "3bit", "16bit", "8bit"
"""Where there is room as with the last; never; in 16 bits alone; in 16 bits, and for few tokens in 8 too."""
CHOICES = (AUTO, PACKED, WIDE, CODED)
SHARE = 0.05
"""Of a device's memory: what layers in 16 bits may take at most, all together."""
FULL = 0.6
"""Of a device's memory: where weights take more, no layer is kept in 16 bits."""
NOTE = "milo_dense_16bit"
"""The key in vLLM's ``additional_config``: bytes of the layers in 16 bits by their names."""


def choice() -> str:
    """Return what ``VLLM_MILO_DENSE`` asks for.

    Raises:
        ValueError: it is none of the choices.
    """
    wanted = os.environ.get(VARIABLE, AUTO)
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}={wanted!r}: must be one of {', '.join(CHOICES)}")
    return wanted


class Place:
    """Room on a device for one layer in 16 bits, noted from the moment the layer is made.

    Attributes:
        size: bytes that the layer takes.
        in_codes: whether it is kept in 8 bits too.
        dropped: how far 8 bits that were dropped are off, relative to the weights; 0 where none were.
    """

    def __init__(self, layer: str, size: int, in_codes: bool, notes: dict[str, Any]) -> None:
        self.size, self.in_codes, self.dropped = size, in_codes, 0.0
        self._layer, self._notes = layer, notes
        self._kept: bool | None = None
        self._settled = False
        notes.setdefault(NOTE, {})[layer] = size

    def keep_codes(self, size: int, error: float) -> bool:
        """Return whether 8 bits of so many bytes that are off by so much are kept too; else the note has 16 alone.

        As for :meth:`keep`, a layer that is loaded once more stays what it was.
        """
        if not self._settled and error > MOST_ERROR:
            self.in_codes, self.dropped = False, error
            self.size -= size
            self._notes[NOTE][self._layer] = self.size
        self._settled = True
        return self.in_codes

    def keep(self, device: torch.device) -> bool:
        """Return whether the layer is kept in 16 bits, now that weights are on the device; else the note is gone.

        A layer that is loaded once more stays what it was: graphs were compiled for it.
        """
        if self._kept is None:
            self._kept = choice() != AUTO or torch.cuda.memory_allocated(device) <= FULL * _total(device)
        if not self._kept:
            self._notes[NOTE].pop(self._layer, None)
        return self._kept


def reserve(layer: str, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Place | None:
    """Return room for a layer that is being made; None where it is not to be kept in 16 bits.

    Args:
        layer: its name.
        outputs: of the layer on this process.
        inputs: likewise.
        device: of the layer.
        dtype: of the activations.
    """
    wanted, notes = choice(), compat.graph_notes()
    if wanted == PACKED or notes is None:
        return None
    by_triton = device.type == "cuda" and dtype.itemsize == 2 and ops.choose_backend("linear", "cuda") == "triton"
    if wanted == AUTO and not by_triton:
        return None
    may_have_codes = by_triton and wanted != WIDE and ops.streams(outputs, inputs, device, in_codes=True)
    for in_codes in (True, False) if may_have_codes else (False,):
        size = outputs * inputs * dtype.itemsize + in_codes * code_bytes(outputs, inputs)
        if wanted != AUTO or size + sum(notes.get(NOTE, {}).values()) <= SHARE * _total(device):
            return Place(layer, size, in_codes, notes)
    return None


def _total(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)
