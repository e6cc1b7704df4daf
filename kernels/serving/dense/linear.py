"""A dense layer on Triton: sums of x, or x in fp16; V·x; the GEMM with U in the epilogue; the sum of its parts of K.

With very many tokens: its weights with their compensators in 16 bits, and a plain GEMM (:mod:`.expand`).
"""

from __future__ import annotations

import torch

from ...launch import launch_mode
from ...weights import LinearSpec, largest_rank
from ..gemm.config import GemmConfig
from ..gemm.heuristic import linear_config
from ..gemm.launcher import gemm
from ..layout import KernelWeights
from ..padding import cut_outputs, pad_inputs, padded
from ..prepare import MAX_ROW, prepare
from ..projection.launcher import project
from ..projection.plan import DownShape
from ..reduce import sum_splits
from .expand import expand
from .wide import multiply_wide

FEW_TOKENS = 256
"""Up to so many rows the latency of launches matters, and they start early."""
MANY_TOKENS = 1536
"""From so many rows on weights in 16 bits pay, see :mod:`.expand`: on an H200 from 500 (Qwen3's output projection) to
1900 (Mixtral's, of rank 512) on."""


def linear(
    x: torch.Tensor, weights: list[torch.Tensor], spec: LinearSpec, config: GemmConfig | None = None
) -> torch.Tensor:
    """Return x·Wᵀ + (x·Vᵀ)·U, [..., K] -> [..., N]; arguments as in :func:`...reference.linear`.

    ``weights`` are :class:`..layout.KernelWeights`; ``config`` forces the tile.
    """
    layer = KernelWeights(*weights)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], sum(spec.widths))
    if config is None and rows.shape[0] >= MANY_TOKENS:
        return multiply_wide(x, expand(weights, spec, x.shape[-1], x.dtype))
    rows = pad_inputs(rows.contiguous())
    config = config or linear_config(rows.shape[0], layer, spec.group_size, x.device)
    mode = launch_mode(x.device, few_tokens=rows.shape[0] <= FEW_TOKENS)
    needs_sums = config.needs_sums(spec.group_size)
    half = x.dtype == torch.bfloat16 and not needs_sums and rows.shape[1] <= MAX_ROW
    shape = DownShape(largest_rank([spec.ranks]), layer.units, config.split_k)
    lanes = config.reads_lanes(spec.group_size)
    source, blocks, (planned,) = prepare(
        rows, None, 1, config.block_m, spec.group_size, half, needs_sums, lanes, [shape], mode
    )
    down = project(source, layer, blocks, None, 1, spec.factor_bits, planned, mode)
    source = source._replace(down=down)
    widths = [padded(width) for width in spec.widths]
    y = gemm(source, layer, blocks, None, 1, spec.group_size, spec.factor_bits, config, mode, x.dtype, widths)
    return cut_outputs(sum_splits(y, x.dtype, mode), spec.widths).view(*x.shape[:-1], sum(spec.widths))
