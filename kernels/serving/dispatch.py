"""Which tiles a MoE layer runs with: those of a tuned file, else the heuristic's."""

from __future__ import annotations

from functools import lru_cache

import torch

from .. import tuned
from ..weights import MoEShape
from .gemm.config import GemmConfig
from .gemm.heuristic import heuristic_configs

_untuned = lru_cache(maxsize=4096)(heuristic_configs)
"""The heuristic, which takes longer than a launch."""


def moe_configs(
    tokens: int, shape: MoEShape, held: float, device: torch.device, dtype: torch.dtype, fast: bool
) -> tuple[GemmConfig, GemmConfig]:
    """Return the tiles of the two GEMMs of a MoE layer.

    Args:
        tokens: of the call.
        shape: of the layer in this process.
        held: share of the model's experts that this process holds; the others' pairs are no load here.
        device: of the layer.
        dtype: of the activations.
        fast: whether weights may be scaled in fp16.

    Raises:
        ValueError: the tuned file of this shape and device is broken.
    """
    loading = tokens if held == 1 else max(1, round(tokens * held))
    found = tuned.find(shape, loading, device, dtype)
    return _untuned(loading * shape.top_k, shape, device, fast) if found is None else found
