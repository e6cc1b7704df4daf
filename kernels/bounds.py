"""How large an expert's outputs can get: what lets the hidden activations be stored in fp16 without a look at them."""

from __future__ import annotations

import torch

from .packing import dequantize, dequantize_factor
from .weights import ExpertWeights

ROWS = 2048
"""Rows that are dequantized at a time."""


def largest_row_norms(weights: ExpertWeights, group_size: int, factor_bits: int) -> torch.Tensor:
    """Return the largest Euclidean norm of a row of W + Uᵀ·V, fp32 [E·P], for each part of each expert.

    By Cauchy and Schwarz, no output of the part is larger than this times the norm of the input.

    Args:
        weights: one grouped GEMM, in the checkpoint layout.
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
    """
    experts, n = weights.packed.shape[:2]
    bounds = weights.rank_offsets.tolist()
    parts = (len(bounds) - 1) // experts
    width = n // parts
    largest = torch.zeros(experts * parts, device=weights.packed.device)
    for slot in range(experts * parts):
        expert, part = divmod(slot, parts)
        factors = slice(bounds[slot], bounds[slot + 1])
        u_scale, v_scale = (weights.u_scale[factors], weights.v_scale[factors]) if factor_bits != 16 else (None, None)
        u = dequantize_factor(weights.u[factors], u_scale, factor_bits)
        v = dequantize_factor(weights.v[factors], v_scale, factor_bits)
        for start in range(0, width, ROWS):
            chunk = slice(start, min(start + ROWS, width))
            rows = slice(part * width + chunk.start, part * width + chunk.stop)
            packed, scale, zero = (tensor[expert, rows] for tensor in (weights.packed, weights.scale, weights.zero))
            matrix = dequantize(packed, scale, zero, group_size) + u[:, chunk].T @ v
            largest[slot] = torch.maximum(largest[slot], torch.linalg.vector_norm(matrix, dim=1).max())
    return largest
