"""The GEMM's kernel: which tile of which expert a program takes."""

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import block_expert, last_pair, load_pairs
from .tile import compute_gated_tile, compute_tile


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "top_k", "max_blocks"])
def gemm_kernel(
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
