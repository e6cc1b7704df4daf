"""A dense layer on Triton: sums and V·x, then the GEMM with U in the epilogue, then the sum of split-K parts."""

from __future__ import annotations

import torch
import triton

from ..weights import LinearSpec, largest_rank
from .dispatch import linear_config
from .gemm import GemmConfig, gemm
from .launch import launch_mode
from .layout import KernelWeights
from .project import project
from .reduce import sum_splits
from .routing import TokenBlocks

FEW_TOKENS = 256
"""Up to so many rows launches count, and start early."""


def linear(
    x: torch.Tensor, weights: list[torch.Tensor], spec: LinearSpec, config: GemmConfig | None = None
) -> torch.Tensor:
    """Return x·Wᵀ + (x·Vᵀ)·U, [..., K] -> [..., N]; arguments as in :func:`..reference.linear`.

    ``weights`` are :class:`.layout.KernelWeights`; ``config`` forces the tile.
    """
    layer = KernelWeights(*weights)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], layer.columns)
    config = config or linear_config(rows.shape[0], layer, spec.group_size, x.device)
    mode = launch_mode(x.device, few_tokens=rows.shape[0] <= FEW_TOKENS)
    blocks = TokenBlocks(None, None, None, triton.cdiv(rows.shape[0], config.block_m), config.block_m)
    max_rank = largest_rank([spec.ranks])
    needs_sums = config.needs_sums(spec.group_size)
    source = project(rows, layer, blocks, None, 1, spec.group_size, spec.factor_bits, max_rank, needs_sums, mode)
    y = gemm(source, layer, spec.widths, blocks, None, 1, spec.group_size, spec.factor_bits, config, mode, x.dtype)
    return sum_splits(y, x.dtype, mode).view(*x.shape[:-1], layer.columns)
