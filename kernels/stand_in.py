"""Tensors that stand in for weights where only their kinds matter: kernels are compiled before anything is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .packing import CODES_PER_UNIT, WORDS_PER_UNIT
from .serving.layout import ROW_BLOCK, UNIT, KernelWeights
from .serving.padding import padded
from .sizes import cdiv
from .weights import RANK_BLOCK, ExpertWeights, factor_elements

_FACTOR_DTYPES = {3: (torch.int16, torch.int32), 8: (torch.int8, torch.int8)}
"""Of U and V in the kernel layout; factors of 16 bits keep theirs."""


def stand_in(
    experts: int,
    widths: Sequence[int],
    k: int,
    group_size: int,
    factor_bits: int,
    dtype: torch.dtype,
    device: torch.device,
    bounded: bool = False,
    biased: bool = False,
) -> list[torch.Tensor]:
    """Return tensors of the shapes, dtypes and device of a prepared layer, each with a single element in memory.

    The compensators' tensors, whose shapes depend on the ranks, are of one element: no kernel is compiled for these.

    Args:
        experts: on this process; 1 for a dense layer.
        widths: outputs of each part of an expert.
        k: inputs.
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
        dtype: of factors of 16 bits.
        device: of the layer.
        bounded: whether the layer has norms, as gate and up projections of experts do.
        biased: whether it has a bias.
    """
    units, columns, parts = cdiv(k, UNIT), sum(map(padded, widths)), len(widths)
    u, v = _FACTOR_DTYPES.get(factor_bits, (dtype, dtype))
    norms = torch.empty(0, dtype=torch.float32, device=device)
    if bounded:
        norms = single((experts * parts,), torch.float32, device)
    layer = KernelWeights(
        single((experts, units, columns // ROW_BLOCK, 3, ROW_BLOCK, 4), torch.int32, device),
        single((experts, units, columns, UNIT // group_size), torch.int32, device),
        single((1,), u, device),
        single((1,), torch.float16, device),
        single((1,), v, device),
        single((1,), torch.int32, device),
        single((experts * parts + 1,), torch.int32, device),
        single((experts * parts,), torch.int64, device),
        norms,
        single((experts,), torch.int32, device),
        single((experts, columns), torch.float32, device) if biased else None,
    )
    return layer.present


def single(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of a shape with a single element in memory."""
    return torch.empty(1, dtype=dtype, device=device).expand(shape)


def smallest_experts(
    parts: int, group_size: int, factor_bits: int, dtype: torch.dtype, device: torch.device
) -> ExpertWeights:
    """Return one expert of 16 ranks in the checkpoint layout, of zeros and as small as can be.

    Args:
        parts: of the expert.
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
        dtype: of factors of 16 bits.
        device: of the tensors.
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    factor = {3: torch.int32, 8: torch.int8, 16: dtype}[factor_bits]
    groups, ranks = (1, parts * ROW_BLOCK, UNIT // group_size), parts * RANK_BLOCK
    return ExpertWeights(
        zeros(1, parts * ROW_BLOCK, UNIT // CODES_PER_UNIT * WORDS_PER_UNIT, dtype=torch.int32),
        zeros(*groups),
        zeros(*groups),
        zeros(ranks, factor_elements(ROW_BLOCK, factor_bits), dtype=factor),
        zeros(ranks, 1),
        zeros(ranks, factor_elements(UNIT, factor_bits), dtype=factor),
        zeros(ranks, 2),
        torch.arange(parts + 1, dtype=torch.int32, device=device) * RANK_BLOCK,
    )
