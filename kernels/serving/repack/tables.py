"""What the kernels are told of a layer's rows and ranks, made on the host and copied once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...weights import RANK_BLOCK, factor_elements, offsets
from ..layout import ROW_BLOCK
from ..padding import padded

RANK_FIELDS = 6
"""Numbers of a block of ranks in :func:`rank_table`."""


def row_table(widths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return int32 [N/64, 2], N of padded parts: the first row of each block of 64 in the source, and how many.

    Args:
        widths: outputs of each part of an expert.
        device: of the result.
    """
    blocks = [
        (start + row, min(ROW_BLOCK, width - row))
        for start, width in zip(offsets(list(widths)), widths, strict=False)
        for row in range(0, width, ROW_BLOCK)
    ]
    return torch.tensor(blocks, dtype=torch.int32, device=device).view(-1, 2)


def rank_table(ranks: Sequence[int], widths: Sequence[int], factor_bits: int, device: torch.device) -> torch.Tensor:
    """Return int64 [R/16, 6], R of padded ranks, of all parts of all experts: where each block of ranks comes from.

    A row is the block's first rank among all (its row of V), how many of 16 there are, the part's outputs, where the
    rank's U and its scales begin in the source (in elements), and the columns of U in the blocks before it.

    Args:
        ranks: of each part of each expert.
        widths: outputs of each.
        factor_bits: 3, 8 or 16.
        device: of the result.
    """
    table: list[tuple[int, ...]] = []
    row = u_start = scale_start = column = 0
    for rank, width in zip(ranks, widths, strict=True):
        elements, scales = factor_elements(width, factor_bits), width // 64
        for first in range(0, rank, RANK_BLOCK):
            starts = u_start + first * elements, scale_start + first * scales
            table.append((row + first, min(RANK_BLOCK, rank - first), width, *starts, column))
            column += padded(width)
        row, u_start, scale_start = row + rank, u_start + rank * elements, scale_start + rank * scales
    return torch.tensor(table, dtype=torch.int64, device=device).view(-1, RANK_FIELDS)
