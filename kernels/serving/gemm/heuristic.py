"""Which tiles are used without a tuned file: from bytes, the tokens of an expert and the device's multiprocessors.

**Tokens of a tile** follow the mean number of an expert's tokens. Up to :data:`SHORT` tokens a tile takes the time of
its weights' bytes, from 64 on that of its arithmetic. Tiles of :data:`SHORTEST` tokens scale products. Larger ones
scale weights, once for all tokens, where that is fast (fp16, :mod:`.dequant`); elsewhere those above
:data:`.config.SCALES_PRODUCTS` do.
An expert's last tokens take a smaller tile where that is expected to cost less.

**Parts of K.** Few tiles leave multiprocessors idle, and many short ones start more often than they compute. Short
tiles take the split with the least :func:`streaming_time`. Its constants are those with which the splits come nearest
to what searches found best on an H100 (groups of 64, rank 16) and on an H200 (groups of 128, more ranks;
``tuning-h200.json`` in ``benchmarks/results/``): none is more than twice or less than half. It is in microseconds, but
only differences count. ``python -m benchmarks.kernels.tune`` prints how far from tuned tiles the choice is.

Nothing here knows a card's name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...launch import bandwidth, processors, shared_memory
from ...sizes import cdiv
from ...weights import MoEShape
from ..layout import UNIT, KernelWeights
from ..projection.plan import RANKS, DownShape, plan, rank_tiles
from ..routing import TokenBlocks
from .config import FOUR_TILES, SCALES_PRODUCTS, THREE_TILES, GemmConfig, rank_step

BLOCK_N = 128
SHORTEST, FEWEST = 8, 5
"""Tokens of the smallest tile, and most of an expert on average with which it is taken: few experts have more than 8.

It takes a tenth less time than one of 16, and at 8 tokens a fifth more, on an H200 (``tuning-groups-of-64-h200.json``).
"""
SHORT = 32
"""Tokens of the largest tile that takes the time of its bytes."""
STREAMED, SHARED = 40, 100
"""Most tokens of an expert on average with tiles of :data:`SHORT` and of 64, where weights are scaled fast.

Mixtral's and Qwen3's layers with 32 take as long with either, those with 64 a tenth less with tiles of 64 than of 128,
those with 128 the same (an H200, ``tuning-fast-scales-h200.json``).
"""
FAST_TOKENS, SCALING_TOKENS = 40, 72
"""Scaling a tile's weights takes as long as the products of so many tokens: fast, and one by one in fp32."""
SPLITS = (1, 2, 4, 8)
LONGEST = 32
"""Most units of a part of K in a tile of :data:`SHORTEST` tokens, where K may be split further.

With 56 of the 112 units of Mixtral's down projections a layer takes 8 to 11 % longer than with 14 or 28 (an H200, two
and four tokens).
"""

START = 2.9
"""Microseconds from a tile's start to its first unit, and from the last one to its end."""
PART, RANK_STEP = 0.25, 0.11
"""Microseconds in which a tile adds one part of V·x, and of each further step of the up-projection."""
UNIT_ALONE, UNIT_ISSUE = 1.09, 0.18
"""Microseconds of a unit of a tile that runs alone, and the part of them in which no other tile can run."""
ALIKE = 1.1
"""Times that differ by less count as equal, and fewer parts of K are taken."""
REACHED = 0.9
"""Share of the memory's bandwidth that is reached."""


class GemmShape(NamedTuple):
    """One of a layer's GEMMs.

    Attributes:
        width: outputs of a part.
        parts: 2 for gate and up, else 1.
        units: units of 128 inputs.
        group: group size.
        rank: largest rank of an expert, its parts padded and added, in whole tiles of V·x: layers whose kernels are the
            same get the same tiles.
        rank_step: ranks that the up-projection takes at a time.
    """

    width: int
    parts: int
    units: int
    group: int
    rank: int
    rank_step: int

    @property
    def tiles(self) -> int:
        """Tiles of a block of tokens."""
        return cdiv(self.width, BLOCK_N) * self.parts

    @property
    def bytes(self) -> int:
        """Bytes of an expert: codes, scales and zero points, V in three bits, and U in four."""
        base = self.tiles * self.units * unit_bytes(self.group)
        return base + self.rank * (self.units * UNIT * 3 // 8 + self.width // 2)


class Load(NamedTuple):
    """How an expected routing loads the experts.

    Attributes:
        pairs: of a token and an expert.
        experts: that have any.
        blocks: blocks of tokens.
        block_m: tokens of a block.
    """

    pairs: int
    experts: float
    blocks: float
    block_m: int


def gemm_shapes(shape: MoEShape) -> tuple[GemmShape, GemmShape]:
    """Return both GEMMs of a layer, gate/up first."""
    sizes = (shape.intermediate, shape.parts, shape.hidden), (shape.hidden, 1, shape.intermediate)
    first, second = (
        GemmShape(width, parts, cdiv(k, UNIT), group, RANKS * rank_tiles(rank), rank_step(rank, parts))
        for (width, parts, k), group, rank in zip(sizes, shape.groups, shape.ranks, strict=True)
    )
    return first, second


def expected_load(num_pairs: int, experts: int, block_m: int) -> Load:
    """Return the load of the mean routing, were experts chosen uniformly."""
    active = experts * (1 - (1 - 1 / experts) ** num_pairs)
    return Load(num_pairs, active, max(active, num_pairs / block_m), block_m)


def heuristic_configs(
    num_pairs: int, shape: MoEShape, device: torch.device, fast: bool = True
) -> tuple[GemmConfig, GemmConfig]:
    """Return tiles for so many pairs of a token and a local expert. The two GEMMs of a layer agree in block_m.

    Args:
        num_pairs: of the call.
        shape: of the layer.
        device: that it is on.
        fast: whether weights may be scaled in fp16, as :func:`..fused_moe.fused_moe` does for most bf16 models.
    """
    mean, group = num_pairs / shape.experts, min(shape.groups)
    fast &= group != 32
    block_m = _block_m(mean, group, fast, device)
    scaled = group != 32 and block_m > (SHORTEST if fast else SCALES_PRODUCTS)
    load = expected_load(num_pairs, shape.experts, block_m)
    tail_m = _tail(block_m, mean)
    first, second = (
        _tile(block_m, _split(gemm, load, scaled, device), scaled, tail_m, device) for gemm in gemm_shapes(shape)
    )
    cap = _cap(first, device)
    first, second = first._replace(max_registers=cap), second._replace(max_registers=cap)
    # what makes the second GEMM's input in fp16 reads whole sums
    return (first._replace(split_k=1) if scaled else first), second


def linear_config(rows: int, layer: KernelWeights, group_size: int, device: torch.device) -> GemmConfig:
    """Return the tile of a dense layer: many tokens take the tile that leaves least of the last round idle."""
    sizes = [size for size in (SHORTEST, 16, 32, 64) if rows <= size]
    sizes = sizes or [size for size in (64, 128) if size <= _largest_block(device)]
    if group_size == 32:
        sizes = [min(sizes[0], 64)]
    tiles = {size: cdiv(layer.columns, BLOCK_N) * cdiv(rows, size) for size in sizes}

    def cost(size: int) -> int:
        """Return the time of all rounds of tiles, in the time of one token's products."""
        return cdiv(tiles[size], resident(size) * processors(device)) * (size + SCALING_TOKENS)

    block_m = sizes[0] if rows <= 64 else min(sizes, key=cost)
    split_k = 1
    while 2 * split_k * tiles[block_m] <= resident(block_m) * processors(device) and layer.units >= 8 * split_k:
        split_k *= 2
    # only one block is not whole: its size matters less than kernels to compile
    return _tile(block_m, min(8, split_k), block_m > SCALES_PRODUCTS and group_size != 32, tails(block_m)[0], device)


def streaming_time(gemm: GemmShape, load: Load, split_k: int, device: torch.device) -> float:
    """Return about how many microseconds a GEMM of short tiles takes with K in so many parts.

    That is the longer of two: what the memory needs for the weights of all experts that have tokens, and what a
    multiprocessor needs for its share of the tiles, as many at a time as fit. Programs of V·x take places of tiles too,
    for a shorter time, and each tile adds up their parts. With K in parts, sums are written in fp32 and read again.
    """
    blocks = TokenBlocks(None, None, None, cdiv(int(load.blocks * 16), 16), load.block_m)
    down = plan(DownShape(gemm.rank, gemm.units, split_k), blocks, dense=False, early=True)
    units = cdiv(gemm.units, split_k)
    work = (load.block_m + SCALING_TOKENS) / (16 + SCALING_TOKENS)
    ends = _ends(gemm, split_k, 1 if down.finish else down.splits)

    def together(tiles: int) -> float:
        return ends + units * max(UNIT_ALONE, tiles * UNIT_ISSUE * work) if tiles else 0.0

    fit = resident(load.block_m)
    short = (START + down.chunk * UNIT_ISSUE * fit) / (ends + units * UNIT_ISSUE * fit)
    programs = load.blocks * (gemm.tiles * split_k + down.rank_tiles * down.splits * min(1.0, short))
    rounds, rest = divmod(cdiv(round(programs), processors(device)), fit)
    computing = rounds * together(fit) + together(rest)
    speed = REACHED * bandwidth(device) / 1e6
    loading = ends + load.experts * gemm.bytes / speed
    sums = 0 if split_k == 1 else 2 * 4 * split_k * load.pairs * gemm.width * gemm.parts / speed
    return max(computing, loading) + sums


def _ends(gemm: GemmShape, split_k: int, down_splits: int) -> float:
    """Return the microseconds of a tile outside its loop over K; parts of K share the ranks too."""
    if gemm.rank == 0:
        return START
    steps = cdiv(cdiv(gemm.rank // gemm.parts, gemm.rank_step), split_k)
    return START + steps * PART * down_splits + (steps - 1) * RANK_STEP


def unit_bytes(group_size: int) -> int:
    """Return the bytes of a unit of 128 codes of all outputs of a tile, with scales and zero points."""
    return (UNIT * 3 // 8 + UNIT // group_size * 4) * BLOCK_N


def pipeline_bytes(block_m: int, stages: int, block_n: int = BLOCK_N) -> int:
    """Return the bytes of shared memory that the load pipeline takes.

    These are ``stages`` units of activations, and one unit less of codes with their scales and zero points: the current
    ones are in registers already.
    """
    return stages * 2 * UNIT * block_m + (stages - 1) * (3 * 16 + 4 * 4) * block_n


def resident(block_m: int) -> int:
    """Return the tiles that fit on a multiprocessor at once, which registers limit.

    Two at least: one scales weights while products of another run.
    """
    return 3 if block_m <= 16 else 2


def tails(block_m: int) -> tuple[int, ...]:
    """Return sizes of the tile for an expert's last pairs, a quarter and half of the others'; 0 for none."""
    return (max(16, block_m // 4), block_m // 2) if block_m > 16 else (0,)


def _block_m(mean: float, group_size: int, fast: bool, device: torch.device) -> int:
    """Return the tokens of a tile for so many pairs an expert."""
    if mean <= FEWEST:
        return SHORTEST
    if fast:
        return SHORT if mean <= STREAMED else 64 if mean <= SHARED else _largest_block(device)
    if mean <= 14:
        return 16
    if mean <= 24:
        return SHORT
    return 64 if group_size == 32 or mean <= 80 else _largest_block(device)


def _largest_block(device: torch.device) -> int:
    """Return the most tokens of a tile whose load pipeline fits into shared memory."""
    return 128 if pipeline_bytes(128, 2) <= shared_memory(device) else 64


def _stages(block_m: int, device: torch.device) -> int:
    """Return the depth of the load pipeline: three or four, less where the tiles of a multiprocessor would not fit."""
    deepest = 4 if block_m <= SHORT else 3
    room = shared_memory(device) // resident(block_m)
    return max((stages for stages in range(2, deepest + 1) if pipeline_bytes(block_m, stages) <= room), default=2)


def _cap(tile: GemmConfig, device: torch.device) -> int | None:
    """Return the registers of a thread with which as many tiles fit as shared memory has room for.

    Tiles wait for their own products before they scale on, so that others must run meanwhile; those that scale products
    have no registers to spare, but for the shortest.
    """
    if tile.block_m == SHORTEST:
        return FOUR_TILES
    fit, cap = (4, FOUR_TILES) if tile.block_m <= SHORT else (3, THREE_TILES)
    roomy = fit * pipeline_bytes(tile.block_m, tile.num_stages) <= shared_memory(device)
    return cap if tile.scaled and tile.block_m <= 64 and roomy else None


def _split(gemm: GemmShape, load: Load, scaled: bool, device: torch.device) -> int:
    """Return the parts of K.

    Tiles that scale weights are few and long where they hold 128 tokens, and no two experts have as many: K is split
    until there are three times as many as fit at once, so that the last round leaves little idle. Tiles of 64 are split
    only where they would leave half of the device idle.
    """
    if load.block_m <= SHORT or not scaled:
        possible = [split for split in SPLITS if split == 1 or gemm.units >= 2 * split]
        if load.block_m == SHORTEST:
            possible = [split for split in possible if cdiv(gemm.units, split) <= LONGEST] or possible[-1:]
        times = {split: streaming_time(gemm, load, split, device) for split in possible}
        return next(split for split in possible if times[split] <= ALIKE * min(times.values()))
    wanted = (3.0 if load.block_m > 64 else 0.5) * resident(load.block_m) * processors(device)
    split_k = 1
    while split_k < SPLITS[-1] and gemm.tiles * load.blocks * split_k < wanted and gemm.units >= 8 * split_k:
        split_k *= 2
    return split_k


def likely_loads(mean: float) -> list[int]:
    """Return likely numbers of an expert's tokens, where the mean is this."""
    return [round(mean + z * mean**0.5) for z in (-1.3, -0.5, 0.0, 0.5, 1.3)]


def blocks_time(load: int, block_m: int, tail_m: int, joined: bool = False) -> int:
    """Return the time of the blocks of an expert with so many tokens, in that of one token's products."""
    whole, rest = divmod(load, block_m)
    time = whole * (block_m + FAST_TOKENS)
    if rest == 0:
        return time
    if rest > tail_m:
        return time + block_m + FAST_TOKENS
    return time + tail_m + (0 if joined and whole else FAST_TOKENS)


def _tail(block_m: int, mean: float) -> int:
    """Return the size of an expert's last tile that costs least."""
    return min(tails(block_m), key=lambda tail: sum(blocks_time(load, block_m, tail) for load in likely_loads(mean)))


def _tile(block_m: int, split_k: int, scaled: bool, tail_m: int, device: torch.device) -> GemmConfig:
    return GemmConfig(
        block_m=block_m,
        block_n=BLOCK_N,
        split_k=split_k,
        scaled=scaled,
        num_warps=4,
        num_stages=_stages(block_m, device),
        group_blocks=4 if scaled and block_m > SHORT else 1,
        tail_m=tail_m,
    )
