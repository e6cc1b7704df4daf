"""MiLo's alternating optimization as published (paper section 3.1).

Quantize W - UᵀV by HQQ (eq. 4 to 9, :mod:`.base.hqq`), then fit UᵀV to the error by a truncated SVD (eq. 10 to 12,
:func:`.compensator.factors.truncated_svd`), until neither helps (the stop rule of appendix A, eq. 14 and 15).
Factors are stored after the loop (eq. 13). The loop works on a batch of matrices of one shape; each stops by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..nouns import Recipe
from .base.group import GroupQuantized
from .base.hqq import quantize_hqq
from .compensator.factors import truncated_svd
from .states import choose_base

WINDOW = 3
"""Rounds whose mean error is compared with the mean of those before."""
MIN_IMPROVEMENT = 1e-4
"""Relative improvement of that mean below which a matrix stops."""


@dataclass
class _Progress:
    """The stop rule (paper appendix A, eq. 14-15) of a batch: which matrices go on."""

    active: torch.Tensor
    history: list[torch.Tensor] = field(default_factory=list)

    def record(self, error: torch.Tensor) -> None:
        """Take the error of this round; stop those whose 3-round mean improved by less than 1e-4."""
        self.history.append(error)
        if len(self.history) <= WINDOW:
            return
        before = torch.stack(self.history[-WINDOW - 1 : -1]).mean(0)
        now = torch.stack(self.history[-WINDOW:]).mean(0)
        self.active = self.active & ((before - now) / before.clamp(min=1e-30) >= MIN_IMPROVEMENT)


def alternate(
    weights: torch.Tensor, rank: int, recipe: Recipe
) -> tuple[GroupQuantized, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the alternating rounds; each matrix keeps the state of the round it stopped in.

    Args:
        weights: float32 [B, N, K].
        rank: of the compensators, 1 to min(N, K).
        recipe: group size, most rounds, seed.

    Returns:
        The base; U [B, r, N] and V [B, r, K] in float32, not stored yet; the rounds [B] that each matrix took.
    """
    generator = torch.Generator(weights.device).manual_seed(recipe.seed)
    batch, n, k = weights.shape
    u = weights.new_zeros(batch, rank, n)
    v = weights.new_zeros(batch, rank, k)
    rounds = torch.zeros(batch, dtype=torch.int64, device=weights.device)
    progress = _Progress(torch.ones(batch, dtype=torch.bool, device=weights.device))
    base: GroupQuantized | None = None
    for _ in range(recipe.max_rounds):
        active = progress.active
        fresh = quantize_hqq(weights - u.mT @ v, recipe.group_size)
        base = fresh if base is None else choose_base(base, fresh, active)
        residual = weights - base.dequantize()
        new_u, new_v = truncated_svd(residual, rank, generator)
        keep = active[:, None, None]
        u, v = torch.where(keep, new_u, u), torch.where(keep, new_v, v)
        rounds += active
        progress.record((residual - u.mT @ v).flatten(1).norm(dim=1))
        if not progress.active.any():
            break
    assert base is not None
    return base, u, v, rounds
