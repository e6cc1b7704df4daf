"""The quantized state of a batch of matrices as numbers that are trained by gradients.

Codes are trained through latents: real numbers whose nearest code is what counts, and whose gradient is the weight's,
as if rounding were not there (the straight-through estimator), while they are in range. Scales, zero points and factors
are trained as they are stored: in fp16, factors rounded to their codes. The layer that is trained holds the weights
themselves, so its backward pass ends at them; what follows from there is elementwise and is done here by hand. On GPUs
one kernel does it, since a layer of large experts has a billion latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_milo.checkpoint import COMPENSATOR_GROUP_SIZE
from vllm_milo.kernels.packing import MAX_CODE

from ..solve.base.group import MAX_SCALE, MIN_SCALE, GroupQuantized
from ..solve.compensator.factors import FACTOR_ZERO, StoredFactor
from ..solve.compensator.factors import MIN_SCALE as MIN_FACTOR_SCALE
from ..solve.compensator.low_rank import StoredPair

BETAS = (0.9, 0.95)
EPSILON = 1e-12
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


class Adam:
    """The first and second moments of one tensor's gradients."""

    def __init__(self, like: torch.Tensor) -> None:
        self.first = torch.zeros_like(like, dtype=torch.float32)
        self.second = torch.zeros_like(like, dtype=torch.float32)

    def move(self, values: torch.Tensor, gradient: torch.Tensor, rate: float | torch.Tensor, pace: Pace) -> None:
        """Move ``values`` against ``gradient`` by one step of Adam."""
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        size = (self.second * pace.second).sqrt_().add_(EPSILON)
        values.sub_(self.first / size * (pace.share * pace.first * rate))


class Pace:
    """What differs between the steps of a training, in one tensor that a captured step reads.

    Attributes:
        values: float32 [3] on the device: share of the learning rates, and what Adam's first and second moments are
            multiplied by, since they begin at 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(3, device=device)

    def set(self, step: int, steps: int, warm_up: int = 10) -> None:
        """Prepare for a step, from 0: rates rise shortly, then fall to 0 along a cosine."""
        share = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        bias = [1 / (1 - beta ** (step + 1)) for beta in BETAS]
        self.values.copy_(torch.tensor([share, *bias]))

    @property
    def share(self) -> torch.Tensor:
        """The share of the learning rates."""
        return self.values[0]

    @property
    def first(self) -> torch.Tensor:
        """The factor of first moments."""
        return self.values[1]

    @property
    def second(self) -> torch.Tensor:
        """The factor of second moments."""
        return self.values[2]


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


class FactorLatents:
    """One factor of a batch of compensators, with its scales; rank-major [B, r, C].

    Args:
        stored: the solver's result.
        bits: 3, 8 or 16.
        rows: which rows belong to a matrix's own rank, bool [B, r]; the others stay 0.
    """

    def __init__(self, stored: StoredFactor, bits: int, rows: torch.Tensor) -> None:
        self._bits = bits
        self._dtype = stored.values.dtype
        self._low, self._high = (-FACTOR_ZERO, MAX_CODE - FACTOR_ZERO) if bits == 3 else (-127, 127)
        self.rows = rows.float().unsqueeze(-1)
        self.values = stored.dequantize() * self.rows
        self._adam = Adam(self.values)
        self._size = self._mean_square(self.values)
        if stored.scale is not None:
            self.scale = stored.scale.float()
            self._adam_scale = Adam(self.scale)
            self._scale_size = self._mean_square(self.scale)

    def _mean_square(self, values: torch.Tensor) -> torch.Tensor:
        """Return the root mean square of each matrix's own rows, [B, 1, 1]."""
        held = self.rows.sum((-2, -1), keepdim=True) * values.shape[-1]
        return ((values * self.rows).square().sum((-2, -1), keepdim=True) / held.clamp(min=1)).sqrt()

    def _steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values and their scales in groups, as stored."""
        scale = self.scale.clamp(min=MIN_FACTOR_SCALE).half().float().unsqueeze(-1)
        return self.values.unflatten(-1, (-1, COMPENSATOR_GROUP_SIZE)) / scale, scale

    def rounded(self) -> torch.Tensor:
        """Return the factor as it is stored, float32 [B, r, C]."""
        if self._bits == 16:
            return self.values.to(self._dtype).float()
        steps, scale = self._steps()
        return (nearest(steps).clamp_(self._low, self._high) * scale).flatten(-2) * self.rows

    def step(self, gradient: torch.Tensor, rate: float, pace: Pace) -> None:
        """Take one step of Adam against the gradient [B, r, C] at the rounded factor."""
        gradient = gradient * self.rows
        if self._bits != 16:
            steps, _ = self._steps()
            inside = (steps >= self._low - 0.5) & (steps <= self._high + 0.5)
            grouped = gradient.unflatten(-1, (-1, COMPENSATOR_GROUP_SIZE))
            rounded = nearest(steps).clamp_(self._low, self._high)
            at_scale = (grouped * (rounded - steps * inside)).sum(-1)
            gradient = (grouped * inside).flatten(-2)
            self._adam_scale.move(self.scale, at_scale, rate * self._scale_size, pace)
        self._adam.move(self.values, gradient, rate * self._size, pace)

    def stored(self) -> StoredFactor:
        """Return the factor as it is stored."""
        if self._bits == 16:
            return StoredFactor(self.values.to(self._dtype), None)
        steps, scale = self._steps()
        codes = nearest(steps).clamp_(self._low, self._high) * self.rows.unsqueeze(-1)
        codes = codes + FACTOR_ZERO if self._bits == 3 else codes
        return StoredFactor(codes.flatten(-2).to(self._dtype), scale.squeeze(-1).half())


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
            own = rows & active.unsqueeze(-1)
            self.pair = (FactorLatents(pair.u, bits, rows), FactorLatents(pair.v, bits, rows))
            self._own = own.float().unsqueeze(-1)
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
            left, right = u.rounded().to(gradient.dtype), v.rounded().to(gradient.dtype)
            at_u, at_v = torch.bmm(right, gradient.mT).float(), torch.bmm(left, gradient).float()
            u.step(at_u * self._own, rates.factors, pace)
            v.step(at_v * self._own, rates.factors, pace)
        self.base.step(gradient, out, rates, pace)
        self._add_compensator(out)

    def _add_compensator(self, out: torch.Tensor) -> None:
        if self.pair is not None:
            u, v = (factor.rounded().to(out.dtype) for factor in self.pair)
            out.add_(torch.bmm(u.mT, v))

    def stored(self) -> tuple[GroupQuantized, StoredPair | None]:
        """Return everything as it is stored."""
        pair = None if self.pair is None else StoredPair(*(factor.stored() for factor in self.pair))
        return self.base.stored(), pair


def nearest(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest integers, halves up: as the kernel rounds."""
    return torch.floor(values + 0.5)
