"""A compact GPTQ (Frantar et al., arXiv 2210.17323): the calibrated baseline of the accuracy benchmark.

Each matrix is rounded column by column against the second moments of its inputs, and the columns not yet rounded
take up the error. Only for comparisons; `milo quantize` does not use it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from benchmarks.accuracy.activations import layers_of, second_moments
from benchmarks.accuracy.quantized_model import QuantizedModel

MAX_CODE = 7
SCALE_BITS = 16


@dataclass(frozen=True)
class Gptq:
    """How to quantize.

    Attributes:
        group_size: weights of a row that share scale and zero point.
        integer_zero: zero points are codes 0..7, as in GPTQ; else fp16 values.
        act_order: round the columns with the largest moments first, with scales fixed beforehand.
        damping: share of the mean of the moments' diagonal that is added to it.
        block: columns between updates of the rest of the matrix.
    """

    group_size: int = 64
    integer_zero: bool = True
    act_order: bool = False
    damping: float = 0.01
    block: int = 128

    @property
    def bits(self) -> float:
        """Return stored bits a weight: codes, fp16 scales, and zero points of 3 or 16 bits."""
        return 3 + (SCALE_BITS + (3 if self.integer_zero else 16)) / self.group_size


def quantize_model(model: QuantizedModel, windows: torch.Tensor, batch: int, options: Gptq) -> None:
    """Quantize a model in place, layer by layer, each with the inputs that the quantized layers before it make.

    Args:
        model: holds the unquantized weights.
        windows: calibration tokens, int64 [..., T]; experts that none of them reaches are rounded to nearest.
        batch: windows of a forward pass.
        options: see :class:`Gptq`.
    """
    for layer in layers_of(model):
        moments = second_moments(model, windows, batch, layer)
        groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name in moments:
            groups[model.matrices[name].n, model.matrices[name].k].append(name)
        for names in groups.values():
            weights = torch.stack([model.source[name] for name in names])
            stacked = torch.stack([moments[name] for name in names])
            model.put(dict(zip(names, gptq(weights, stacked, options), strict=True)))


def gptq(weights: torch.Tensor, moments: torch.Tensor, options: Gptq) -> torch.Tensor:
    """Return the quantized values of a batch of matrices.

    Args:
        weights: float32 [B, N, K].
        moments: XᵀX of each matrix's inputs, float32 [B, K, K]; where its diagonal is 0 the column has no inputs,
            and its error is not passed on. All 0 therefore is rounding to nearest.
        options: see :class:`Gptq`.

    Returns:
        float32 [B, N, K], s·(q - z).
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    order = torch.arange(weights.shape[-1], device=weights.device).expand_as(diagonal)
    if options.act_order:
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
    fixed = _grid(weights.unflatten(-1, (-1, options.group_size)), options) if options.act_order else None
    columns = order.unsqueeze(1).expand_as(weights)
    work = weights.gather(-1, columns)
    factor = _inverse_factor(_permuted(moments, order), options.damping)
    result = torch.empty_like(work)
    for start in range(0, work.shape[-1], options.block):
        end = min(start + options.block, work.shape[-1])
        block = slice(start, end)
        errors = _round_block(work, result, factor, block, order, fixed, options)
        work[..., end:] -= errors @ factor[:, block, end:]
    return torch.empty_like(result).scatter_(-1, columns, result)


def _round_block(
    work: torch.Tensor,
    result: torch.Tensor,
    factor: torch.Tensor,
    block: slice,
    order: torch.Tensor,
    fixed: tuple[torch.Tensor, torch.Tensor] | None,
    options: Gptq,
) -> torch.Tensor:
    """Round the columns of a block one by one; return their errors over the factor's diagonal, [B, N, columns]."""
    errors = torch.zeros_like(work[..., block])
    rows = torch.arange(work.shape[0], device=work.device)
    grid = fixed
    for column in range(block.start, block.stop):
        if fixed is None and column % options.group_size == 0:
            grid = _grid(work[..., None, column : column + options.group_size], options)
        assert grid is not None
        groups = order[:, column] // options.group_size if fixed is not None else torch.zeros_like(rows)
        scale, zero = (part[rows, :, groups] for part in grid)
        values = work[..., column]
        codes = (values / scale + zero).round().clamp(0, MAX_CODE)
        result[..., column] = scale * (codes - zero)
        error = (values - result[..., column]) / factor[:, column, column, None]
        work[..., column : block.stop] -= error.unsqueeze(-1) * factor[:, None, column, column : block.stop]
        errors[..., column - block.start] = error
    return errors


def _grid(groups: torch.Tensor, options: Gptq) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point [B, N, G] of groups [B, N, G, g], in float32 but as they would be stored."""
    low, high = groups.amin(-1), groups.amax(-1)
    if options.integer_zero:  # the range must hold 0, or an integer zero point cannot
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / MAX_CODE).clamp(min=2.0**-14).half().float()
    zero = -low / scale
    return scale, zero.round().clamp(0, MAX_CODE) if options.integer_zero else zero.half().float()


def _permuted(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    size = moments.shape[-1]
    rows = moments.gather(1, order.unsqueeze(-1).expand(-1, -1, size))
    return rows.gather(2, order.unsqueeze(1).expand(-1, size, -1))


def _inverse_factor(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped moments' inverse, float32 [B, K, K]."""
    damped = moments.double()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    diagonal += torch.where(dead, 1.0, damping * diagonal.mean(-1, keepdim=True))
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
