"""Random quantized layers made on the device they are timed on: random words are random codes."""

from __future__ import annotations

import torch

from ..weights import (
    ExpertWeights,
    LinearSpec,
    LinearWeights,
    MoESpec,
    factor_elements,
    largest_rank,
    offsets,
)

FACTOR_BITS = 3
CODE_SPREAD = 2.29
"""Standard deviation of a code drawn evenly from 0..7."""


def random_words(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return int32 words with every bit random."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def random_scales(shape: tuple[int, ...], mean: float, device: torch.device) -> torch.Tensor:
    """Return fp16 scales, evenly from 0.5 to 1.5 times ``mean``."""
    return ((torch.rand(shape, device=device) + 0.5) * mean).half()


def _base(
    shape: tuple[int, ...], k: int, group: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, scales and zeros of [*shape, k], such that a product with unit inputs has unit size."""
    groups = (*shape, k // group)
    scale = random_scales(groups, 1 / (CODE_SPREAD * k**0.5), device)
    zero = (3.5 + torch.randn(groups, device=device) * 0.2).half()
    return random_words((*shape, k * 3 // 32), device), scale, zero


def random_experts(
    experts: int, parts: int, rank: int, n: int, k: int, group: int, device: torch.device
) -> ExpertWeights:
    """Return one expert GEMM, n counting all parts, with compensators of ``rank`` in 3 bits."""
    rows = experts * parts * rank
    return ExpertWeights(
        *_base((experts, n), k, group, device),
        random_words((rows, factor_elements(n // parts, FACTOR_BITS)), device),
        random_scales((rows, n // parts // 64), 0.1 / CODE_SPREAD, device),
        random_words((rows, factor_elements(k, FACTOR_BITS)), device),
        random_scales((rows, k // 64), 1 / (CODE_SPREAD * k**0.5), device),
        torch.tensor(offsets([rank] * (experts * parts)), dtype=torch.int32, device=device),
    )


def moe_spec(rank13: int, rank2: int) -> MoESpec:
    """Return the spec of a layer whose gate and up projections have one rank and whose down projections another."""
    return MoESpec(FACTOR_BITS, "silu", False, [largest_rank([[rank13, rank13]]), largest_rank([[rank2]])])


def random_linear(
    widths: list[int], rank: int, k: int, group: int, device: torch.device
) -> tuple[LinearWeights, LinearSpec]:
    """Return a linear layer of several parts, each with a compensator of ``rank`` (at most its width) in 3 bits."""
    ranks = [min(rank, width) for width in widths]
    pairs = list(zip(ranks, widths, strict=True))
    weights = LinearWeights(
        *_base((sum(widths),), k, group, device),
        random_words((sum(r * factor_elements(width, FACTOR_BITS) for r, width in pairs),), device),
        random_scales((sum(r * (width // 64) for r, width in pairs),), 0.1 / CODE_SPREAD, device),
        random_words((sum(ranks), factor_elements(k, FACTOR_BITS)), device),
        random_scales((sum(ranks), k // 64), 1 / (CODE_SPREAD * k**0.5), device),
    )
    return weights, LinearSpec(widths, ranks, group, FACTOR_BITS)
