"""Which tiles are worth a try at a number of tokens: those that fit the device, the cheapest by a model of their cost.

The model is rough, so it only drops what costs far more than the best. Tiles that scale products and tiles that scale
weights have models of their own and are not compared with each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..launch import processors, shared_memory
from ..serving.gemm.config import FIVE_TILES, FOUR_TILES, SIX_TILES, THREE_TILES, GemmConfig
from ..serving.gemm.heuristic import (
    FAST_TOKENS,
    SHORT,
    SHORTEST,
    GemmShape,
    blocks_time,
    expected_load,
    gemm_shapes,
    heuristic_configs,
    likely_loads,
    pipeline_bytes,
    resident,
    streaming_time,
)
from ..tuned import Tiles
from ..weights import MoEShape

TILES = (
    GemmConfig(8, 128, 1, False, 4, 5),
    *(GemmConfig(8, 128, 1, False, 4, 4, max_registers=cap) for cap in (FOUR_TILES, FIVE_TILES, SIX_TILES)),
    *(GemmConfig(16, 128, 1, False, 4, stages) for stages in (3, 4)),
    *(GemmConfig(16, 128, 1, True, 4, 4, max_registers=cap) for cap in (FOUR_TILES, FIVE_TILES)),
    GemmConfig(32, 128, 1, False, 4, 4),
    *(GemmConfig(32, 128, 1, True, 4, stages, max_registers=FOUR_TILES) for stages in (3, 4)),
    GemmConfig(32, 128, 1, True, 4, 3, max_registers=FIVE_TILES),
    *(GemmConfig(64, 128, 1, True, 4, 3, 4, max_registers=cap) for cap in (THREE_TILES, None)),
    GemmConfig(128, 128, 1, True, 4, 3, 4),
)
"""Tiles that are tried, each with several tails and parts of K."""
JOINING = 32
"""Tokens of the tiles whose tails are also tried joined to the block before them: larger ones lack registers."""
SPLITS = (1, 2, 4, 8)
WORSE = 1.5
"""Tiles that should take so many times as long as the best of their kind are left out."""
MOST = 14
"""Candidates for one GEMM at one number of tokens."""


def first_candidates(tokens: int, shape: MoEShape, device: torch.device) -> list[Tiles]:
    """Return pairs of tiles that differ in the first GEMM's, the heuristic's own first, then those that should do best.

    The second GEMM's tile is the same, with K in as many parts as the heuristic's.
    """
    default = heuristic_configs(tokens * shape.top_k, shape, device)
    tried = [default]
    for tile in _best(tokens, shape, 0, device):
        pair = (tile, tile._replace(split_k=default[1].split_k))
        if pair not in tried:
            tried.append(pair)
    return tried[: MOST + 1]


def second_candidates(tokens: int, shape: MoEShape, winner: Tiles, device: torch.device) -> list[Tiles]:
    """Return the pairs that keep the winner's first tile; the second's agrees with it in block_m."""
    same = [tile for tile in _best(tokens, shape, 1, device) if tile.block_m == winner[0].block_m]
    return [pair for tile in same if (pair := (winner[0], tile)) != winner][:MOST]


def all_candidates(tokens: int, shape: MoEShape, device: torch.device) -> list[Tiles]:
    """Return pairs that hold every tile that may be tried, the likely ones first."""
    firsts = first_candidates(tokens, shape, device)
    pairs = list(firsts)
    for block_m in dict.fromkeys(first.block_m for first, _ in firsts):
        same = next(pair for pair in firsts if pair[0].block_m == block_m)
        pairs += second_candidates(tokens, shape, same, device)
    return list(dict.fromkeys(pairs))


def fits(tile: GemmConfig, device: torch.device) -> bool:
    """Whether a tile's load pipeline fits into the device's shared memory."""
    tokens = tile.block_m + (tile.tail_m if tile.joined else 0)
    return pipeline_bytes(tokens, tile.num_stages, tile.block_n) <= shared_memory(device)


def cost(tile: GemmConfig, gemm: GemmShape, tokens: int, shape: MoEShape, device: torch.device) -> float:
    """Return about what a GEMM costs with a tile; to be compared among tiles that scale the same."""
    pairs = tokens * shape.top_k
    load = expected_load(pairs, shape.experts, tile.block_m)
    if not tile.scaled:
        return streaming_time(gemm, load, tile.split_k, device)
    mean = max(1.0, pairs / shape.experts)
    loads = likely_loads(mean)
    rows = sum(blocks_time(max(1, one), tile.block_m, tile.tail_m, tile.joined) for one in loads) / len(loads)
    work = load.experts * gemm.tiles * gemm.units * rows
    places = resident(tile.block_m) * processors(device) / (tile.block_n / 128)
    longest = (tile.block_m + FAST_TOKENS) * gemm.units / tile.split_k
    sums = 0.0 if tile.split_k == 1 else tile.split_k * pairs * gemm.width * gemm.parts / 2e6
    return work / places / (tile.block_n / 128) + longest / 2 + sums


def _best(tokens: int, shape: MoEShape, place: int, device: torch.device) -> list[GemmConfig]:
    """Return the tiles for one of the GEMMs that are worth a try, the cheapest first, of both kinds in turn."""
    gemm = gemm_shapes(shape)[place]
    kinds: dict[bool, list[tuple[float, GemmConfig]]] = {}
    for tile in _tiles(tokens, shape, gemm, place, device):
        kinds.setdefault(tile.scaled, []).append((cost(tile, gemm, tokens, shape, device), tile))
    kept = []
    for found in kinds.values():
        found.sort(key=lambda pair: pair[0])
        kept.append([tile for price, tile in found if price <= WORSE * found[0][0]])
    return list(_in_turn(kept))


def _in_turn(lists: Iterable[list[GemmConfig]]) -> Iterator[GemmConfig]:
    rest = [list(reversed(one)) for one in lists]
    while any(rest):
        for one in rest:
            if one:
                yield one.pop()


def _tiles(tokens: int, shape: MoEShape, gemm: GemmShape, place: int, device: torch.device) -> Iterator[GemmConfig]:
    """Yield tiles for about as many tokens as an expert gets, with the tails and parts of K that they may have.

    Products are scaled only by the shortest, and by all where groups are of 32: a tile that scales weights does it too
    where that is not fast (:attr:`..serving.gemm.config.GemmConfig.by_products`).
    """
    pairs = tokens * shape.top_k
    mean = pairs / min(shape.experts, pairs)
    for tile in TILES:
        least = mean / 8 if tile.scaled else mean / 1.5
        if not least <= tile.block_m <= max(16, 3 * mean):
            continue
        if min(shape.groups) == 32:
            if tile.scaled and tile.block_m <= SHORT:
                continue
            tile = tile._replace(scaled=False, group_blocks=1)
        elif not tile.scaled and tile.block_m > SHORTEST:
            continue
        splits = (1,) if tile.scaled and place == 0 else SPLITS
        for split in splits:
            if split == 1 or gemm.units >= 2 * split:
                yield from (same for same in _tails(tile._replace(split_k=split)) if fits(same, device))


def _tails(tile: GemmConfig) -> Iterator[GemmConfig]:
    """Yield a tile with the tails that it may have, apart and, where it is small, joined to the block before them."""
    if tile.scaled:
        for tail in (tile.block_m // 2, tile.block_m // 4):
            if tail >= 8:
                yield tile._replace(tail_m=tail)
            if tile.block_m == JOINING and tail >= 16:
                yield tile._replace(tail_m=tail, joined=True)
    else:
        yield from (tile._replace(tail_m=tail) for tail in (0, 8, 16) if tail < tile.block_m)
