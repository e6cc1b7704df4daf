"""Adam, step by step on tensors that stay where they are, so that a step can be captured in a CUDA graph."""

from __future__ import annotations

import math

import torch

BETAS = (0.9, 0.95)
EPSILON = 1e-12


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

    Args:
        device: where it is read.

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
