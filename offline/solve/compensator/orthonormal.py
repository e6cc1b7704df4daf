"""Orthonormal bases of few long rows, from matrix products and small Cholesky factorizations only.

No QR or SVD of anything but r x r matrices, batched over matrices, so that thousands of experts cost a GPU seconds.
"""

from __future__ import annotations

import torch

from ..precision import exact_products


def orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the span of ``rows`` [..., r, C], by Cholesky QR applied twice.

    Rows that depend on others come out as noise of unit size or less; products with them stay finite.
    """
    for _ in range(2):
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        rows = torch.linalg.solve_triangular(damped_cholesky(gram(rows)), rows, upper=False)
    return rows


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Return rows·rowsᵀ [..., r, r] to full precision."""
    with exact_products(rows.device):
        return rows @ rows.mT


def damped_cholesky(moment: torch.Tensor) -> torch.Tensor:
    """Return the Cholesky factor of Gram matrices [..., r, r], with just enough on the diagonal that it exists."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    size = diagonal.mean(-1, keepdim=True).clamp(min=1e-30)
    damping = 1e-6
    while True:
        damped = moment.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping * size)
        root, info = torch.linalg.cholesky_ex(damped)
        if damping > 1 or not info.any():
            return root
        damping *= 10
