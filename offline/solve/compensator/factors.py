"""Low-rank compensators: the truncated SVD of a residual, and the storage of its factors in 3 or 8 bits.

Factors are rank-major, U [..., r, N] and V [..., r, K]: the compensator of W [N, K] is Uᵀ·V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_milo.checkpoint import COMPENSATOR_GROUP_SIZE

from .orthonormal import orthonormal_rows

EXACT_SIZE = 1024
"""Matrices with a smaller side up to this get an exact SVD; larger ones a randomized one."""
OVERSAMPLING = 16
POWER_ITERATIONS = 4
MIN_SCALE = 2.0**-18
"""Factor scales may be subnormal in fp16; down to here they keep six bits."""
FACTOR_ZERO = 4


class StoredFactor(NamedTuple):
    """A factor as it is stored: ``values`` [..., r, C] (codes 0..7 uint8, int8, or floats), scales or None."""

    values: torch.Tensor
    scale: torch.Tensor | None

    def rows(self, index: int, rank: int) -> StoredFactor:
        """Return the first ``rank`` rows of the factor at ``index`` of a batch."""
        scale = None if self.scale is None else self.scale[index, :rank]
        return StoredFactor(self.values[index, :rank], scale)

    def to(self, device: torch.device) -> StoredFactor:
        """Return the factor on a device."""
        return StoredFactor(self.values.to(device), None if self.scale is None else self.scale.to(device))

    def dequantize(self) -> torch.Tensor:
        """Return the factor's values in float32, [..., r, C]."""
        if self.scale is None:
            return self.values.float()
        zero = FACTOR_ZERO if self.values.dtype == torch.uint8 else 0
        steps = (self.values.float() - zero).unflatten(-1, (-1, COMPENSATOR_GROUP_SIZE))
        return (steps * self.scale.float().unsqueeze(-1)).flatten(-2)


def truncated_svd(
    residual: torch.Tensor, rank: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best rank-``rank`` factors of a batch of residuals, √S split evenly (paper eq. 10 to 12).

    Exact, by the eigenvectors of the smaller Gram matrix, where the smaller side is at most :data:`EXACT_SIZE`;
    else randomized subspace iteration with oversampling, seeded by ``generator``. A residual is nearly noise, with a
    flat spectrum that a randomized SVD separates badly: on one of side 1024 it leaves 0.1 % more than the exact one
    at rank 16 and 0.8 % more at rank 256.

    Args:
        residual: float32 [..., N, K].
        rank: 1 to min(N, K).
        generator: source of the random sketch, on the device of ``residual``.

    Returns:
        U [..., rank, N] and V [..., rank, K], float32.
    """
    n, k = residual.shape[-2:]
    if n < k:
        v, u = truncated_svd(residual.mT, rank, generator)
        return u, v
    if k <= EXACT_SIZE or rank + OVERSAMPLING >= k:
        # ascending; squaring costs accuracy only in directions far below the leading ones, which are cut off
        right = torch.linalg.eigh(residual.mT @ residual).eigenvectors[..., -rank:].flip(-1).mT
    else:
        right = _leading_directions(residual, rank + OVERSAMPLING, generator)[..., :rank, :]
    left = residual @ right.mT  # columns U·S
    root = left.norm(dim=-2).clamp(min=1e-30).sqrt().unsqueeze(-1)
    return left.mT / root, right * root


def store_factor(factor: torch.Tensor, bits: int, dtype: torch.dtype) -> StoredFactor:
    """Quantize one factor, symmetric, one fp16 scale per 64 values of a row (paper eq. 13).

    3 bits: w = scale·(q - 4) with scale = 2·s/7, q = clamp(round(w/scale) + 4, 0, 7). The paper's s is the
    largest value of the group, which for a group without large positive values is tiny or negative; here it
    is the largest magnitude. 8 bits: w = scale·q, scale = max|w|/127.

    Args:
        factor: float32 [..., r, C], C a multiple of 64.
        bits: 3, 8 or 16.
        dtype: the model's dtype, in which 16-bit factors are stored.
    """
    if bits == 16:
        return StoredFactor(factor.to(dtype), None)
    groups = factor.unflatten(-1, (-1, COMPENSATOR_GROUP_SIZE))
    largest = groups.abs().amax(-1)
    scale = (largest * (2 / 7 if bits == 3 else 1 / 127)).clamp(min=MIN_SCALE).half()
    steps = (groups / scale.float().unsqueeze(-1)).round().flatten(-2)
    if bits == 3:
        return StoredFactor((steps + FACTOR_ZERO).clamp(0, 7).to(torch.uint8), scale)
    return StoredFactor(steps.clamp(-127, 127).to(torch.int8), scale)


def _leading_directions(matrix: torch.Tensor, size: int, generator: torch.Generator | None) -> torch.Tensor:
    """Return about the ``size`` leading right singular vectors as rows, the first ones the most exact.

    Randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1).
    """
    sketch = torch.randn(size, matrix.shape[-1], generator=generator, device=matrix.device, dtype=matrix.dtype)
    left = orthonormal_rows(sketch @ matrix.mT)
    for _ in range(POWER_ITERATIONS):
        left = orthonormal_rows(orthonormal_rows(left @ matrix) @ matrix.mT)
    projected = left @ matrix
    # its right singular vectors, by the eigenvectors of the small Gram matrix; ascending
    turn = torch.linalg.eigh(projected @ projected.mT).eigenvectors.flip(-1).mT
    return orthonormal_rows(turn @ projected)
