"""GEMM on 3-bit weights, grouped by expert or dense, with the compensators' up-projection in the epilogue.

:mod:`.tile` is what one tile does; here is which tile a program takes, and the launcher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import LaunchMode, launch
from .layout import KernelWeights
from .project import Projected, block_expert, block_kind, last_pair, load_pairs
from .routing import Routes, TokenBlocks
from .tile import compute_gated_tile, compute_tile

MAX_PARTS = 4


class GemmConfig(NamedTuple):
    """A tile and how it is run.

    Attributes:
        block_m: tokens of a tile.
        block_n: outputs of a tile.
        split_k: parts of K that are computed apart and added by the consumer.
        scaled: scale the weights in registers (many tokens) instead of the products (few tokens).
        num_warps: warps of a tile.
        num_stages: depth of the load pipeline.
        group_blocks: neighbouring token blocks that go through the outputs together.
        tail_m: size of the smaller tile for an expert's last pairs; 0 for none.
        max_registers: cap on a thread's registers, so that more tiles fit; None for no cap.
    """

    block_m: int
    block_n: int
    split_k: int
    scaled: bool
    num_warps: int
    num_stages: int
    group_blocks: int = 1
    tail_m: int = 0
    max_registers: int | None = None

    def scales_weights(self, group_size: int) -> bool:
        """Whether whole tiles scale weights; groups of 32 never do."""
        return self.scaled and group_size != 32

    def needs_sums(self, group_size: int) -> bool:
        """Whether the GEMM reads the sums of its input: scaled weights hold the zero points already."""
        return not self.scales_weights(group_size)


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "top_k", "max_blocks"])
def _gemm_kernel(
    x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
    row_scale_ptr, norm_ptr, largest_ptr, out_ptr, out_scale_ptr,
    pairs_ptr, experts_ptr, num_blocks_ptr, ids_ptr, map_ptr,
    N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank, max_blocks,
    PARTS: tl.constexpr, GROUP: tl.constexpr, FACTOR_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    DOWN_SPLITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, HAS_MAP: tl.constexpr, BLOCKS: tl.constexpr,
    SCALE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_M: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr, RANK_STEP: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N outputs, BLOCK_M pairs] tile of one expert, over one of SPLIT_K parts of K.

    x [num_rows, K] in 16 bits; pair p reads row p // top_k; out [SPLIT_K, num_pairs, N]; sums and down as in
    :class:`.project.Projected`; weights as in :class:`.layout.KernelWeights`. Parts are n0.. columns wide, and
    no tile holds columns of two. EVEN_N: all are multiples of BLOCK_N. EVEN_K: K is one of 128. GROUP_BLOCKS
    neighbouring blocks, mostly of one expert, go through the tiles together and share the weights in the cache.
    SCALE: what is scaled, "products", "weights" or "fast" (weights in fp16), see :mod:`.dequant`. HAS_ROW_SCALE:
    x holds the rows of the activations divided by row_scale. TAIL_M > 0: a block with at most so many pairs, an
    expert's last, runs as a tile of that size. RANK_STEP: ranks that the epilogue takes at a time.
    ACTIVATION: "", or that of gate and up, which a tile then takes both of: out is fp16 [num_pairs, N / 2], of rows
    divided by out_scale; norm are those of the rows of the activations, largest those of the weights.
    """
    # the launch before is then the one of V·x, which has waited for all others
    late_wait: tl.constexpr = PDL and HAS_RANK
    if PDL and not HAS_RANK:
        tl.extra.cuda.gdc_wait()
    if ACTIVATION != "":
        tiles = n0 // (BLOCK_N // 2)
    else:
        tiles = tl.cdiv(n0, BLOCK_N) + tl.cdiv(n1, BLOCK_N) + tl.cdiv(n2, BLOCK_N) + tl.cdiv(n3, BLOCK_N)
    in_group = tl.program_id(0) % (GROUP_BLOCKS * tiles)
    block = tl.program_id(0) // (GROUP_BLOCKS * tiles) * GROUP_BLOCKS
    group_blocks = tl.minimum(max_blocks - block, GROUP_BLOCKS)  # the last group may have less
    block += in_group % group_blocks
    tile = in_group // group_blocks
    split_index = tl.program_id(1)
    expert = block_expert(experts_ptr, num_blocks_ptr, ids_ptr, map_ptr, block, max_blocks, HAS_MAP, BLOCKS)
    pairs = load_pairs(pairs_ptr, block, num_pairs, max_blocks, BLOCK_M, BLOCKS)
    is_tail = False
    if TAIL_M > 0:
        is_tail = last_pair(pairs_ptr, block * BLOCK_M + TAIL_M, num_pairs, max_blocks * BLOCK_M, BLOCKS)
        share: tl.constexpr = BLOCK_M // TAIL_M
        few = load_pairs(pairs_ptr, block * share, num_pairs, max_blocks * share, TAIL_M, BLOCKS)
    if expert < 0:
        # one program must wait, or the launch after could overtake the one before; others would be in tiles' places
        if late_wait:  # noqa: SIM102 (a constant, which Triton must see by itself)
            if tl.program_id(0) + tl.program_id(1) == 0:
                tl.extra.cuda.gdc_wait()
        return
    if TAIL_M > 0:  # noqa: SIM102 (a constant, which Triton must see by itself)
        if is_tail:
            _compute(
                x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr,
                down_ptr, row_scale_ptr, norm_ptr, largest_ptr, out_ptr, out_scale_ptr, pairs_ptr,
                expert, block * share, few, tile, split_index,
                N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank, max_blocks * share,
                PARTS, GROUP, FACTOR_BITS, HAS_RANK, DOWN_SPLITS, BF16, ASM, SCALE, EVEN_N, EVEN_K,
                HAS_ROW_SCALE, PDL, TAIL_M, BLOCK_N, SPLIT_K, STAGES, RANK_STEP, late_wait, ACTIVATION, BLOCKS,
            )  # fmt: skip
            return
    _compute(
        x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr,
        down_ptr, row_scale_ptr, norm_ptr, largest_ptr, out_ptr, out_scale_ptr, pairs_ptr,
        expert, block, pairs, tile, split_index,
        N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank, max_blocks,
        PARTS, GROUP, FACTOR_BITS, HAS_RANK, DOWN_SPLITS, BF16, ASM, SCALE, EVEN_N, EVEN_K,
        HAS_ROW_SCALE, PDL, BLOCK_M, BLOCK_N, SPLIT_K, STAGES, RANK_STEP, late_wait, ACTIVATION, BLOCKS,
    )  # fmt: skip


@triton.jit
def _compute(
    x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr,
    down_ptr, row_scale_ptr, norm_ptr, largest_ptr, out_ptr, out_scale_ptr, pairs_ptr,
    expert, block, pairs, tile, split_index,
    N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank, max_blocks,
    PARTS: tl.constexpr, GROUP: tl.constexpr, FACTOR_BITS: tl.constexpr, HAS_RANK: tl.constexpr,
    DOWN_SPLITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
    SCALE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    RANK_STEP: tl.constexpr, LATE_WAIT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile, with or without the activation, of the pairs of a block (in blocks of BLOCK_M)."""
    if ACTIVATION != "":
        compute_gated_tile(
            x_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
            row_scale_ptr, norm_ptr, largest_ptr, out_ptr, out_scale_ptr, pairs_ptr, expert, block, pairs, tile,
            split_index, N, K, num_pairs, top_k, max_rank, max_blocks,
            GROUP, FACTOR_BITS, HAS_RANK, DOWN_SPLITS, ASM, EVEN_K, PDL,
            BLOCK_M, BLOCK_N, STAGES, RANK_STEP, LATE_WAIT, ACTIVATION, BLOCKS,
        )  # fmt: skip
    else:
        compute_tile(
            x_ptr, sums_ptr, packed_ptr, scale_zero_ptr, u_ptr, u_scale_ptr, rank_blocks_ptr, u_starts_ptr, down_ptr,
            row_scale_ptr, out_ptr, pairs_ptr, expert, block, pairs, tile, split_index,
            N, K, n0, n1, n2, n3, num_pairs, num_rows, top_k, max_rank, max_blocks,
            PARTS, GROUP, FACTOR_BITS, HAS_RANK, DOWN_SPLITS, BF16, ASM, SCALE, EVEN_N, EVEN_K,
            HAS_ROW_SCALE, PDL, BLOCK_M, BLOCK_N, SPLIT_K, STAGES, RANK_STEP, LATE_WAIT, BLOCKS,
        )  # fmt: skip


class Hidden(NamedTuple):
    """act(gate)·up of every pair: fp16 [pairs, I] of rows divided by ``row_scale``, fp32 [pairs]."""

    x: torch.Tensor
    row_scale: torch.Tensor


def gemm(
    source: Projected,
    weights: KernelWeights,
    widths: list[int],
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
    mode: LaunchMode,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch the GEMM.

    Args:
        source: activations, fp16 or bf16 [rows, K], contiguous, with their sums and V·x; pair p reads row p // top_k.
        weights: the experts, or the dense layer, in the kernel layout.
        widths: outputs of each part, at most four, multiples of 64.
        blocks: the pairs in blocks of ``config.block_m``.
        routes: where the pairs go; None for a dense layer, whose pairs are its rows.
        top_k: pairs that share a row of x.
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
        config: the tile.
        mode: how to launch.
        dtype: of the result: that of the activations, which x may hold in another (``source.row_scale``).

    Returns:
        [split_k, pairs, N]: ``dtype`` if split_k is 1, else fp32 partial sums. Rows of pairs whose
        expert is not local are not written.

    Raises:
        ValueError: shapes, dtypes or the tile do not fit.
    """
    pairs = source.x.shape[0] if routes is None else routes.num_pairs
    out_dtype = dtype if config.split_k == 1 else torch.float32
    out = torch.empty(config.split_k, pairs, weights.columns, dtype=out_dtype, device=source.x.device)
    tiles = sum(triton.cdiv(width, config.block_n) for width in widths)
    _launch(source, weights, widths, blocks, routes, top_k, group_size, factor_bits, config, mode, tiles, out)
    return out


def gemm_gated(
    source: Projected,
    weights: KernelWeights,
    blocks: TokenBlocks,
    routes: Routes,
    top_k: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
    mode: LaunchMode,
    activation: str,
) -> Hidden:
    """Launch the GEMM of gate and up with the activation in its epilogue; arguments as in :func:`gemm`.

    ``source`` must be fp16 with ``row_scale`` and ``norm``, and the tile must not split K.

    Raises:
        ValueError: shapes, dtypes or the tile do not fit.
    """
    if config.split_k != 1 or source.row_scale is None or source.norm is None:
        raise ValueError("the activation needs whole sums of fp16 rows with their scales and norms")
    half, device = weights.columns // 2, source.x.device
    if half % (config.block_n // 2):  # a tile takes both parts of half as many columns, and all of them
        config = config._replace(block_n=128)
    out = torch.empty(routes.num_pairs, half, dtype=torch.float16, device=device)
    hidden = Hidden(out, torch.empty(routes.num_pairs, dtype=torch.float32, device=device))
    tiles = half // (config.block_n // 2)
    common = (group_size, factor_bits, config, mode, tiles, out)
    _launch(source, weights, [half, half], blocks, routes, top_k, *common, activation, hidden.row_scale)
    return hidden


def _launch(
    source: Projected,
    weights: KernelWeights,
    widths: list[int],
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
    mode: LaunchMode,
    tiles: int,
    out: torch.Tensor,
    activation: str = "",
    out_scale: torch.Tensor | None = None,
) -> None:
    x = source.x
    rows, k = x.shape
    _check(x, weights, widths, blocks, group_size, config)
    scale = "products"
    if config.scales_weights(group_size):
        scale = "weights" if source.row_scale is None else "fast"
    max_rank = 0 if source.down is None else source.down.shape[2]
    launch(
        _gemm_kernel,
        (tiles * blocks.max_blocks, config.split_k),
        mode,
        x,
        source.sums,
        weights.packed,
        weights.scale_zero,
        weights.u,
        weights.u_scale,
        weights.rank_blocks,
        weights.u_starts,
        source.down,
        source.row_scale,
        source.norm if activation else None,
        weights.norms if activation else None,
        out,
        out_scale,
        blocks.pairs,
        blocks.experts,
        blocks.num_blocks,
        None if routes is None else routes.ids,
        None if routes is None else routes.expert_map,
        weights.columns,
        k,
        *widths,
        *[0] * (MAX_PARTS - len(widths)),
        rows if routes is None else routes.num_pairs,
        rows,
        top_k,
        max_rank,
        blocks.max_blocks,
        PARTS=len(widths),
        GROUP=group_size,
        FACTOR_BITS=factor_bits,
        HAS_RANK=source.down is not None,
        DOWN_SPLITS=1 if source.down is None else source.down.shape[0],
        BF16=x.dtype == torch.bfloat16,
        ASM=mode.asm,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        BLOCKS=block_kind(blocks, routes),
        SCALE=scale,
        HAS_ROW_SCALE=source.row_scale is not None,
        EVEN_N=all(width % config.block_n == 0 for width in widths),
        EVEN_K=k % 128 == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL_M=config.tail_m if config.tail_m < config.block_m else 0,
        SPLIT_K=config.split_k,
        STAGES=config.num_stages,
        GROUP_BLOCKS=config.group_blocks,
        RANK_STEP=64 if max_rank >= 64 * len(widths) else 16,
        ACTIVATION=activation,
        PDL=mode.early,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )


def _check(
    x: torch.Tensor,
    weights: KernelWeights,
    widths: list[int],
    blocks: TokenBlocks,
    group_size: int,
    config: GemmConfig,
) -> None:
    k = x.shape[1]
    if x.dtype not in (torch.float16, torch.bfloat16) or not x.is_contiguous():
        raise ValueError(f"x must be contiguous fp16 or bf16, found {x.dtype} with strides {x.stride()}")
    if weights.units != triton.cdiv(k, 128) or k % group_size:
        raise ValueError(
            f"weights have {weights.units} units of 128 inputs in groups of {group_size}, but x {k} columns"
        )
    if sum(widths) != weights.columns or not 1 <= len(widths) <= MAX_PARTS:
        raise ValueError(
            f"parts of {widths} outputs (at most {MAX_PARTS} parts), but the weights have {weights.columns}"
        )
    if config.block_n % 64:
        raise ValueError(f"block_n must be a multiple of 64, found {config.block_n}")
    if blocks.block_m != config.block_m:
        raise ValueError(f"pairs are in blocks of {blocks.block_m}, the tile has {config.block_m}")
