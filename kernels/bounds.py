"""How large an expert's outputs can get: what lets the hidden activations be stored in fp16 without a look at them."""

from __future__ import annotations

import torch

from .packing import dequantize
from .reference import expert_factors
from .weights import ExpertWeights

ROWS = 2048
"""Rows that are dequantized at a time."""


def largest_row_norms(weights: ExpertWeights, factor_bits: int) -> torch.Tensor:
    """Return the largest Euclidean norm of a row of W + Uᵀ·V, fp32 [E·P], for each part of each expert.

    By Cauchy and Schwarz, no output of the part is larger than this times the norm of the input.

    Args:
        weights: one grouped GEMM, in the checkpoint layout.
        factor_bits: 3, 8 or 16.
    """
    experts, n = weights.packed.shape[:2]
    parts = (len(weights.rank_offsets) - 1) // experts
    width = n // parts
    largest = torch.zeros(experts, parts, dtype=torch.float32, device=weights.packed.device)
    for expert in range(experts):
        factors = expert_factors(weights, expert, factor_bits, torch.float32)
        for part in range(parts):
            for start in range(0, width, ROWS):
                stop = min(start + ROWS, width)
                rows = slice(part * width + start, part * width + stop)
                packed, scale, zero = (tensor[expert, rows] for tensor in (weights.packed, weights.scale, weights.zero))
                matrix = dequantize(packed, scale, zero, weights.group_size)
                if factors:
                    u, v = factors[part]
                    matrix += u[:, start:stop].T @ v
                norm = torch.linalg.vector_norm(matrix, dim=1).max()
                largest[expert, part] = torch.maximum(largest[expert, part], norm)
    return largest.flatten()
