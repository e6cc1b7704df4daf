"""The compensators' down-projection V·x, before the GEMM, which multiplies it by Uᵀ and adds that in its epilogue.

Every tile of the GEMM needs all of V·x, so it cannot be computed inside; but only its epilogue does, so the GEMM's
loop over K runs at the same time where launches start early.

Programs take parts of K. Who adds the parts (:mod:`.plan`): every tile of the GEMM for itself, or once and for
all the program of V·x that is done last. It knows by a counter, which the launch of :mod:`..prepare` sets to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...launch import LaunchMode, launch
from ...sizes import cdiv
from ..blocks import block_kind, make_blocks
from ..gemm.arguments import Activations
from ..layout import KernelWeights
from ..routing import Routes, TokenBlocks
from .arguments import Factor, Result, Tile
from .kernel import project_kernel
from .plan import RANKS, Plan, pipeline_stages


class Projected(NamedTuple):
    """Input of a GEMM.

    Attributes:
        x: activations, 16 bits, [rows, K].
        sums: fp32 [K/128, rows, 128/g'], sums of x over g' = min(group_size, 64) columns.
        down: V·x, fp32 [splits, pairs, ranks], to be added over splits, or in x's dtype [1, pairs, ranks] where that
            is done or there is one part; None where no expert has rank.
        row_scale: fp32 [rows]; x, sums and down are those of the activations divided by it. None for 1.
        norm: fp32 [rows], Euclidean norms of the activations, where the GEMM applies the activation.
        lanes: x with zeros up to whole units [rows, units·128], in :func:`..gemm.lanes.lane_order`; None where the
            GEMM does not read it.
    """

    x: torch.Tensor
    sums: torch.Tensor
    down: torch.Tensor | None
    row_scale: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    lanes: torch.Tensor | None = None


class Planned(NamedTuple):
    """A V·x of a layer, worked out before the layer's first launch.

    Attributes:
        plan: how it is spread over programs.
        counters: int32, empty where the programs need none. The layer's first launch sets them to 0, for one use.
    """

    plan: Plan
    counters: torch.Tensor


def allocate_counters(plans: Sequence[Plan], device: torch.device) -> tuple[torch.Tensor, list[Planned]]:
    """Return uninitialized counters, int32, as one buffer and as its parts with each plan."""
    # each part at a multiple of 16 bytes: kernels are compiled anew for other addresses
    sizes = [cdiv(one.counters, 4) * 4 for one in plans]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    return buffer, [Planned(*pair) for pair in zip(plans, buffer.split(sizes), strict=True)]


def project(
    source: Projected,
    weights: KernelWeights,
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    factor_bits: int,
    planned: Planned,
    mode: LaunchMode,
) -> torch.Tensor | None:
    """Return V·x as in :class:`Projected`.

    Args:
        source: activations, fp16 or bf16 [rows, K], contiguous, without V·x; pair p reads row p // top_k.
        weights: the GEMM's weights.
        blocks: the pairs in the GEMM's blocks.
        routes: where the pairs go; None for a dense layer, whose pairs are its rows.
        top_k: pairs that share a row of x.
        factor_bits: 3, 8 or 16.
        planned: what :func:`..prepare.prepare` returned for this V·x.
        mode: how to launch.
    """
    how, counters = planned
    if how.max_rank == 0:
        return None
    x = source.x
    rows, k = x.shape
    lanes = source.lanes.view(torch.int32) if source.lanes is not None and factor_bits == 3 else None
    num_pairs = rows if routes is None else routes.num_pairs
    num_experts = weights.packed.shape[0]
    parts = None
    if how.splits > 1:
        parts = torch.empty(how.splits, num_pairs, how.max_rank, dtype=torch.float32, device=x.device)
    down = parts
    if down is None or how.finish:
        down = torch.empty(1, num_pairs, how.max_rank, dtype=x.dtype, device=x.device)
    tile = Tile(
        PARTS=(weights.rank_blocks.shape[0] - 1) // num_experts,
        FACTOR_BITS=factor_bits,
        RANKS=RANKS,
        BF16=x.dtype == torch.bfloat16,
        ASM=mode.asm,
        WARP_MMA=mode.warps,
        LANES=lanes is not None,
        EVEN_K=k % 128 == 0,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        SHARED_ROWS=top_k > 1,
        BLOCKS=block_kind(blocks, routes),
        BLOCK_M=how.block_m,
        SUB_BLOCKS=how.sub_blocks,
        STAGES=pipeline_stages(how.block_m),
        FINISH=how.finish,
        PDL=mode.early,
    )
    launch(
        project_kernel,
        (how.splits, how.rank_tiles, how.blocks),
        mode,
        Activations(x, None if lanes is None else source.sums, lanes),
        Factor(weights.v, weights.v_scale, weights.rank_blocks),
        Result(down, parts if how.finish else None, counters if how.finish else None),
        make_blocks(blocks, routes),
        k,
        num_pairs,
        rows,
        top_k,
        how.max_rank,
        blocks.max_blocks,
        how.chunk,
        how.splits,
        how.rank_tiles,
        TILE=tile,
        num_warps=4,
    )
    return down
