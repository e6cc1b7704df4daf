"""The quantized state of a batch of matrices as numbers that are trained by gradients.

Codes are trained through latents: real numbers whose nearest code is what counts, and whose gradient is the weight's,
as if rounding were not there (the straight-through estimator), while they are in range. Scales, zero points and factors
are trained as they are stored: in fp16, factors rounded to their codes. The layer that is trained holds the weights
themselves, so its backward pass ends at them; what follows from there is elementwise and is done here by hand. On GPUs
one kernel does it, since a layer of large experts has a billion latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_milo.kernels.packing import MAX_CODE

from ..solve.base.group import MAX_SCALE, MIN_SCALE, GroupQuantized
from ..solve.compensator.low_rank import StoredPair
from .adam import BETAS, Adam, Pace
from .factor_latents import FactorLatents, nearest

EDGE = 0.45
"""A latent begins at most so far from its code: what rounding took away is given back, but no code changes at once."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam, whose steps have about this size.

    Attributes:
        codes: of latents, in codes.
        scale: of scales, relative to where they begin.
        zero: of zero points, in codes.
        factors: of factors and their scales, relative to their root mean square. They are the solver's best already:
            at 4e-3 they learn the text by heart (first six layers of a real model of 0.5 B parameters: KL 0.0191, at
            1e-3 0.0183, untrained 0.0185; 2026-11-27).
    """

    codes: float = 0.01
    scale: float = 1e-3
    zero: float = 5e-3
    factors: float = 1e-3


class BaseLatents:
    """Latents, scales and zero points of a batch of matrices.

    Args:
        target: what the base stands for: the weights minus the compensator, float32 [B, N, K].
        base: the solver's result.
        active: which matrices of the batch are trained, bool [B].
    """

    def __init__(self, target: torch.Tensor, base: GroupQuantized, active: torch.Tensor) -> None:
        self._groups = base.scale.shape[-1]
        scale, zero = base.scale.float(), base.zero.float()
        # a group of zeros has scale 1, with which a step would make large weights of them
        empty = (self._grouped(base.codes) == 0).all(-1) & (zero == 0) & active[:, None, None]
        scale = torch.where(empty, torch.full_like(scale, MIN_SCALE), scale)
        exact = self._grouped(target) / scale.unsqueeze(-1) + zero.unsqueeze(-1)
        codes = self._grouped(base.codes.float())
        self.latent = (codes + (exact - codes).clamp_(-EDGE, EDGE)).flatten(-2)
        self.begin_scale, self.change, self.zero = scale, torch.zeros_like(scale), zero.clone()
        self.active = active.float()
        self.adam_latent, self.adam_change, self.adam_zero = Adam(self.latent), Adam(scale), Adam(scale)

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (self._groups, -1))

    @property
    def scale(self) -> torch.Tensor:
        """The scales as stored, fp16 [B, N, G]."""
        return (self.begin_scale * (1 + self.change)).clamp_(MIN_SCALE, MAX_SCALE).half()

    @property
    def stored_zero(self) -> torch.Tensor:
        """The zero points as stored, fp16 [B, N, G]."""
        return self.zero.clamp(-MAX_SCALE, MAX_SCALE).half()

    def codes(self) -> torch.Tensor:
        """Return the nearest codes, float32 [B, N, K]."""
        return nearest(self.latent).clamp_(0, MAX_CODE)

    def write(self, out: torch.Tensor) -> None:
        """Write the weights s·(q - z) into ``out`` [B, N, K]."""
        steps = self._grouped(self.codes()).sub_(self.stored_zero.float().unsqueeze(-1))
        out.copy_(steps.mul_(self.scale.float().unsqueeze(-1)).flatten(-2))

    def step(self, gradient: torch.Tensor, out: torch.Tensor, rates: Rates, pace: Pace) -> None:
        """Take one step of Adam and write the new weights.

        Args:
            gradient: of the loss at the weights, [B, N, K].
            out: as in :meth:`write`.
            rates: learning rates.
            pace: of this step.
        """
        if gradient.is_cuda:
            from vllm_milo.kernels.convert.learn import step_base

            by_part = (rates.codes, rates.scale, rates.zero)
            step_base(self, gradient, out, by_part, BETAS, (MIN_SCALE, MAX_SCALE), pace.values)
            return
        grouped = self._grouped(gradient.float())
        codes, latent = self._grouped(self.codes()), self._grouped(self.latent)
        inside = (latent >= -0.5) & (latent <= MAX_CODE + 0.5)
        scale, zero = self.scale.float().unsqueeze(-1), self.stored_zero.float().unsqueeze(-1)
        at_change = (grouped * (codes - zero)).sum(-1) * self.begin_scale
        at_zero = -(grouped * scale).sum(-1)
        at_latent = (grouped * scale * inside).flatten(-2)
        active = self.active[:, None, None]
        self.adam_latent.move(self.latent, at_latent, active * rates.codes, pace)
        self.adam_change.move(self.change, at_change, active * rates.scale, pace)
        self.adam_zero.move(self.zero, at_zero, active * rates.zero, pace)
        self.write(out)

    def stored(self) -> GroupQuantized:
        """Return codes, scales and zero points as they are stored."""
        return GroupQuantized(self.codes().to(torch.uint8), self.scale, self.stored_zero)


class Latents:
    """Everything that is trained of a batch of matrices of one shape.

    Args:
        weights: float32 [B, N, K].
        base: codes, scales and zero points.
        pair: factors with the rows of the largest rank, or None where no matrix has rank.
        ranks: of each matrix.
        bits: of the factors.
        active: which matrices are trained, bool [B].
    """

    def __init__(
        self,
        weights: torch.Tensor,
        base: GroupQuantized,
        pair: StoredPair | None,
        ranks: Sequence[int],
        bits: int,
        active: torch.Tensor,
    ) -> None:
        self.pair: tuple[FactorLatents, FactorLatents] | None = None
        target = weights
        if pair is not None:
            most = torch.arange(max(ranks), device=weights.device)
            rows = most < torch.tensor(ranks, device=weights.device).unsqueeze(-1)
            trained = rows & active.unsqueeze(-1)
            self.pair = (FactorLatents(pair.u, bits, rows, trained), FactorLatents(pair.v, bits, rows, trained))
            target = torch.baddbmm(weights, self.pair[0].rounded().mT, self.pair[1].rounded(), alpha=-1)
        self.base = BaseLatents(target, base, active)

    def write(self, out: torch.Tensor) -> None:
        """Write the weights that everything stored stands for into ``out`` [B, N, K]."""
        self.base.write(out)
        self._add_compensator(out)

    def step(self, gradient: torch.Tensor, out: torch.Tensor, rates: Rates, pace: Pace) -> None:
        """Take one step against the gradient at the weights [B, N, K], and write the new weights into ``out``."""
        if self.pair is not None:
            u, v = self.pair
            left, right = (factor.current(gradient.dtype) for factor in self.pair)
            at_u, at_v = torch.bmm(right, gradient.mT), torch.bmm(left, gradient)
            u.step(at_u, rates.factors, pace)
            v.step(at_v, rates.factors, pace)
        self.base.step(gradient, out, rates, pace)
        self._add_compensator(out)

    def _add_compensator(self, out: torch.Tensor) -> None:
        if self.pair is not None:
            u, v = (factor.current(out.dtype) for factor in self.pair)
            out.baddbmm_(u.mT, v)

    def stored(self) -> tuple[GroupQuantized, StoredPair | None]:
        """Return everything as it is stored."""
        pair = None if self.pair is None else StoredPair(*(factor.stored() for factor in self.pair))
        return self.base.stored(), pair
