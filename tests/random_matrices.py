"""Random weights and moments that have what real ones have: heavy tails, strong directions, outliers."""

from __future__ import annotations

import torch

from vllm_milo.offline.nouns import Moments


def heavy_tailed(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * torch.rand(shape[-2:]).square() * 0.1


def trained_like(*shape: int) -> torch.Tensor:
    """Weights with a few strong directions, as attention's."""
    rank = 8
    left, right = torch.randn(*shape[:-1], rank), torch.randn(*shape[:-2], rank, shape[-1])
    return 0.02 * torch.randn(shape) + 0.02 * left @ right


def moment(batch: int, size: int) -> torch.Tensor:
    """A second moment with outlier channels and correlations."""
    samples = torch.randn(batch, 4 * size, size) * torch.logspace(-1, 1, size)
    samples = samples + torch.randn(batch, 4 * size, 1)
    return samples.mT @ samples / samples.shape[1]


def all_moments(batch: int, n: int, k: int) -> dict[str, Moments]:
    """Moments of every kind that a metric is made of."""
    full = Moments(moment(batch, k), moment(batch, n))
    diagonal = Moments(*(part.diagonal(dim1=-2, dim2=-1) for part in (full.inputs, full.outputs)))
    return {"none": Moments(), "diagonal": diagonal, "full": full}
