"""The factors of compensators as numbers that are trained by gradients, rounded as they are stored."""

from __future__ import annotations

import torch

from vllm_milo.checkpoint import COMPENSATOR_GROUP_SIZE
from vllm_milo.kernels.packing import MAX_CODE

from ..solve.compensator.factors import FACTOR_ZERO, StoredFactor
from ..solve.compensator.factors import MIN_SCALE as MIN_FACTOR_SCALE
from .adam import BETAS, Adam, Pace


class FactorLatents:
    """One factor of a batch of compensators, with its scales; rank-major [B, r, C].

    Args:
        stored: the solver's result.
        bits: 3, 8 or 16.
        rows: which rows belong to a matrix's own rank, bool [B, r]; the others stay 0.
        trained: which rows are trained, bool [B, r]; by default all of these.
    """

    def __init__(
        self, stored: StoredFactor, bits: int, rows: torch.Tensor, trained: torch.Tensor | None = None
    ) -> None:
        self._bits = bits
        self._dtype = stored.values.dtype
        self._trained = (rows if trained is None else rows & trained).float()
        self._current: torch.Tensor | None = None
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

    def current(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the factor as it is stored in ``dtype``; a step on a GPU writes the new one into the same tensor."""
        if self._current is None or self._current.dtype != dtype:
            self._current = self.rounded().to(dtype)
        return self._current

    def step(self, gradient: torch.Tensor, rate: float, pace: Pace) -> None:
        """Take one step of Adam against the gradient [B, r, C] at the rounded factor."""
        if gradient.is_cuda:
            self._step_on_gpu(gradient, rate, pace)
            return
        self._current = None
        gradient = gradient.float() * self._trained.unsqueeze(-1)
        if self._bits != 16:
            steps, _ = self._steps()
            inside = (steps >= self._low - 0.5) & (steps <= self._high + 0.5)
            grouped = gradient.unflatten(-1, (-1, COMPENSATOR_GROUP_SIZE))
            rounded = nearest(steps).clamp_(self._low, self._high)
            at_scale = (grouped * (rounded - steps * inside)).sum(-1)
            gradient = (grouped * inside).flatten(-2)
            self._adam_scale.move(self.scale, at_scale, rate * self._scale_size, pace)
        self._adam.move(self.values, gradient, rate * self._size, pace)

    def _step_on_gpu(self, gradient: torch.Tensor, rate: float, pace: Pace) -> None:
        from vllm_milo.kernels.convert.learn_factors import FactorState, step_factor

        scaled = self._bits != 16
        adams = [self._adam, self._adam_scale] if scaled else [self._adam]
        state = FactorState(
            self.values,
            self.scale if scaled else None,
            [moment for adam in adams for moment in (adam.first, adam.second)],
            [self._size, self._scale_size] if scaled else [self._size],
            self._trained,
        )
        limits = (self._low, self._high, MIN_FACTOR_SCALE)
        step_factor(state, gradient, self.current(gradient.dtype), rate, BETAS, limits, pace.values)

    def stored(self) -> StoredFactor:
        """Return the factor as it is stored."""
        if self._bits == 16:
            return StoredFactor(self.values.to(self._dtype), None)
        steps, scale = self._steps()
        codes = nearest(steps).clamp_(self._low, self._high) * self.rows.unsqueeze(-1)
        codes = codes + FACTOR_ZERO if self._bits == 3 else codes
        return StoredFactor(codes.flatten(-2).to(self._dtype), scale.squeeze(-1).half())


def nearest(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest integers, halves up: as the kernel rounds."""
    return torch.floor(values + 0.5)
