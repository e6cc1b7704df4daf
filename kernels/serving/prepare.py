"""What comes before the V·x of a GEMM's input, in one launch: the sort of the pairs, and what the GEMM wants of x.

Where few tokens come with their router's logits, the sort chooses their experts too (:mod:`.choose`). What the GEMM
wants is the sums of x over groups, with which zero points are taken off while tokens are few, and x in the order in
which the lanes of a warp take it where they are fewest; or x in fp16 where many tokens meet weights in fp16 (see
:mod:`.gemm.dequant`). What makes the second GEMM's input makes them as well. The counters of all of a layer's V·x start
here: each launch has its own, whichever stream or graph it runs in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..launch import LaunchMode, launch
from ..sizes import cdiv, next_power_of_2
from .activation import power_of_two
from .choose import FEW_TOKENS, ROWS, Choice, choose_and_sort
from .gemm.lanes import lane_order
from .layout import UNIT
from .projection.launcher import Planned, Projected, allocate_counters
from .projection.plan import DownShape, plan
from .routing import Routes, TokenBlocks, allocate_blocks, sort_expert, sort_sizes

SUM_ROWS = 16
"""Rows of x of one program that sums them."""
HALF_VALUES = 16384
"""Values of x that one program brings to fp16, where there are many rows and warps."""
MAX_ROW = 32768
"""Longest row that one program takes whole, as fp16 activations need it."""
MOST_WARPS = 16
"""Warps of a program of the sort of many pairs, which takes longest."""
COUNTERS = 1024
"""Counters that one program sets to 0."""


@triton.jit
def _store_sums(
    sums_ptr, lanes_ptr, x_ptr, row_block, unit, K, num_rows, SUM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Store the sums over SUM columns of one unit of ROWS rows of x, and with ``LANES`` the rows in `lane_order`."""
    rows = row_block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    k = unit * 128 + tl.arange(0, 128)
    place = x_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
    x = tl.load(place, mask=valid[:, None] & (k < K)[None, :], other=0.0)
    if LANES:
        ordered = lanes_ptr + (rows.to(tl.int64) * ((K + 127) // 128) + unit)[:, None] * 128 + lane_order(128)[None, :]
        tl.store(ordered, x, mask=valid[:, None])
    per_unit: tl.constexpr = 128 // SUM
    sums = tl.sum(tl.reshape(x.to(tl.float32), (ROWS, per_unit, SUM)), 2)
    target = sums_ptr + (unit * num_rows + rows.to(tl.int64))[:, None] * per_unit + tl.arange(0, per_unit)[None, :]
    tl.store(target, sums, mask=valid[:, None])


@triton.jit
def _store_half(
    half_ptr, row_scale_ptr, norm_ptr, x_ptr, row_block, K, num_rows, ROWS: tl.constexpr, ROW: tl.constexpr
):  # fmt: skip
    """Store ROWS rows of x in fp16, each divided by a power of two so that its largest value is between 1 and 2."""
    rows = row_block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    k = tl.arange(0, ROW)
    place = rows[:, None].to(tl.int64) * K + k[None, :]
    inside = valid[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = power_of_two(tl.max(tl.abs(x), 1))
    x *= inverse[:, None]
    tl.store(half_ptr + place, x.to(tl.float16), mask=inside)
    tl.store(row_scale_ptr + rows, scale, mask=valid)
    tl.store(norm_ptr + rows, scale * tl.sqrt(tl.sum(x * x, 1)), mask=valid)


@triton.jit
def _zero(counters_ptr, program, num_counters, COUNTERS: tl.constexpr):
    """Set COUNTERS counters to 0."""
    place = program * COUNTERS + tl.arange(0, COUNTERS)
    tl.store(counters_ptr + place, 0, mask=place < num_counters)


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "num_experts", "num_counters"])
def _prepare_kernel(
    x_ptr, sums_ptr, lanes_ptr, half_ptr, row_scale_ptr, norm_ptr, ids_ptr, map_ptr, pairs_ptr, experts_ptr,
    num_blocks_ptr, counters_ptr, logits_ptr, padding_ptr, weights_ptr,
    K, num_pairs, num_rows, num_experts, num_counters,
    SUM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, HALF_ROW: tl.constexpr, COUNTERS: tl.constexpr,
    HAS_MAP: tl.constexpr, SORT_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, CHOOSE_ROWS: tl.constexpr, RENORMALIZES: tl.constexpr, EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Jobs that do not need each other: the sort into blocks of SORT_M (if > 0), by ids or by logits of CHOOSE_ROWS
    rows (if > 0), zeros in the counters, and of x either fp16 rows of up to HALF_ROW (if > 0) or sums, with rows in the
    order of lanes. The sort takes longest, and is first.

    Its step in :mod:`.protocol` is ``PREPARE``.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    sorts = 0
    if SORT_M > 0:
        sorts = num_experts
    elif CHOOSE_ROWS > 0:
        sorts = 1
    zeroes = tl.cdiv(num_counters, COUNTERS)
    if program >= sorts + zeroes:
        program -= sorts + zeroes
        if HALF_ROW > 0:
            _store_half(half_ptr, row_scale_ptr, norm_ptr, x_ptr, program, K, num_rows, ROWS, HALF_ROW)
        else:
            units = (K + 127) // 128
            _store_sums(sums_ptr, lanes_ptr, x_ptr, program // units, program % units, K, num_rows, SUM, LANES, ROWS)
    elif program >= sorts:
        _zero(counters_ptr, program - sorts, num_counters, COUNTERS)
    elif CHOOSE_ROWS > 0:
        choose_and_sort(
            logits_ptr, padding_ptr, ids_ptr, weights_ptr, pairs_ptr, experts_ptr, num_blocks_ptr, program,
            num_pairs // TOP_K, TOP_K, SLOTS, CHOOSE_ROWS, RENORMALIZES, SORT_M, EXPERTS, BINS,
        )  # fmt: skip
    elif SORT_M > 0:
        sort_expert(
            ids_ptr, map_ptr, pairs_ptr, experts_ptr, num_blocks_ptr, program,
            num_pairs, num_experts, HAS_MAP, SORT_M, BINS, CHUNK,
        )  # fmt: skip


def _warps(chunk: int, half_row: int) -> int:
    """Return the warps of a program."""
    if chunk > 2048:
        return MOST_WARPS
    return 8 if chunk > 512 or half_row > 4096 else 4


def _block_rows(half_row: int, warps: int) -> int:
    """Return the rows of x of one program; ``half_row`` are the values of one that goes to fp16, else 0."""
    if not half_row:
        return SUM_ROWS
    return max(1, HALF_VALUES // half_row) if warps == MOST_WARPS else 1


def prepare(
    x: torch.Tensor,
    routes: Routes | None,
    num_experts: int,
    block_m: int,
    group_size: int,
    half: bool,
    need_sums: bool,
    need_lanes: bool,
    downs: Sequence[DownShape],
    mode: LaunchMode,
    choice: Choice | None = None,
) -> tuple[Projected, TokenBlocks, list[Planned]]:
    """Return the input of a GEMM, without V·x, the pairs in blocks, and the plan of every V·x of the layer.

    In fp16 (``half``), x of a bf16 model loses nothing that matters: bf16 has 8 significant bits and fp16 11, so values
    down to 2^-15 of a row's largest lose nothing, smaller ones what is 2^-25 of it.

    Args:
        x: activations, fp16 or bf16 [rows, K], contiguous.
        routes: where the pairs go; None for a dense layer, whose pairs are its rows.
        num_experts: local experts.
        block_m: pairs of a block.
        group_size: 32, 64 or 128.
        half: whether the GEMM wants fp16 rows, of at most :data:`MAX_ROW`.
        need_sums: whether it wants the sums, which it does not with ``half``.
        need_lanes: whether it wants the rows in the order of lanes, which it does with the sums alone.
        downs: every V·x of the layer.
        mode: how to launch.
        choice: of up to :data:`.choose.FEW_TOKENS` tokens, by which the ids of the routes are written first, all of
            whose experts are local; None if they are there.

    Returns:
        The input, its sums empty where not needed; the blocks; and for each of ``downs`` its plan with its counters,
        which are 0 once this launch is done. A single token, each of whose pairs is a block, and a dense layer need no
        sort.
    """
    rows, k = x.shape
    units = cdiv(k, UNIT)
    sum_size = min(group_size, 64)
    sums = torch.empty(units if need_sums else 0, rows, 128 // sum_size, dtype=torch.float32, device=x.device)
    lanes = x.new_empty(rows, units * UNIT) if need_lanes else None
    source = Projected(x, sums, None, lanes=lanes)
    half_row = 0
    if half:
        scale, norm = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        source = Projected(torch.empty_like(x, dtype=torch.float16), sums, None, scale, norm)
        half_row = next_power_of_2(k)
    if routes is None:
        num_pairs, blocks = rows, TokenBlocks(None, None, None, cdiv(rows, block_m), block_m)
    else:
        num_pairs, blocks = routes.num_pairs, allocate_blocks(routes, num_experts, block_m)
    sort = blocks.pairs is not None
    bins, chunk = sort_sizes(num_experts, num_pairs) if sort or choice is not None else (1, 1)
    top_k = 1 if routes is None else routes.ids.shape[1]
    plans = [plan(down, blocks, routes is None, mode.early) for down in downs]
    buffer, planned = allocate_counters(plans, x.device)
    warps = _warps(chunk, half_row)
    block_rows = _block_rows(half_row, warps)
    parts = 1 if half else units if need_sums else 0
    row_programs = cdiv(rows, block_rows) * parts
    sorts = num_experts if sort else int(choice is not None)
    programs = row_programs + sorts + cdiv(buffer.numel(), COUNTERS)
    if programs == 0:
        return source, blocks, planned
    launch(
        _prepare_kernel,
        (programs,),
        mode,
        x,
        sums,
        lanes,
        source.x if half else None,
        source.row_scale,
        source.norm,
        None if routes is None else routes.ids,
        None if routes is None else routes.expert_map,
        blocks.pairs,
        blocks.experts,
        blocks.num_blocks,
        buffer,
        None if choice is None else choice.logits,
        None if choice is None else choice.padding,
        None if choice is None else choice.weights,
        k,
        num_pairs,
        rows,
        num_experts,
        buffer.numel(),
        SUM=sum_size,
        LANES=need_lanes,
        ROWS=block_rows,
        HALF_ROW=half_row,
        COUNTERS=COUNTERS,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        SORT_M=block_m if sort else 0,
        BINS=bins,
        CHUNK=chunk,
        TOP_K=top_k,
        SLOTS=next_power_of_2(top_k),
        CHOOSE_ROWS=0 if choice is None else ROWS if rows <= ROWS else FEW_TOKENS,
        RENORMALIZES=choice is not None and choice.renormalizes,
        EXPERTS=0 if choice is None else num_experts,
        PDL=mode.early,
        num_warps=warps,
    )
    return source, blocks, planned
