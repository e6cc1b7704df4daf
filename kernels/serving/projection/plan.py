"""How V·x is spread over programs."""

from __future__ import annotations

from typing import NamedTuple

from ...sizes import cdiv, next_power_of_2
from ..routing import WHOLE, TokenBlocks

RANKS = 64
"""Ranks of a program: fewer would not be multiplied by a whole warpgroup, and take as long."""


def rank_tiles(max_rank: int) -> int:
    """Return the parts of the ranks; 0 for none."""
    return cdiv(max_rank, RANKS)


class DownShape(NamedTuple):
    """What is known of a V·x before its input.

    Attributes:
        max_rank: largest rank of an expert, each part padded to 16; 0 for none.
        units: units of 128 inputs.
        split_k: parts of K of the GEMM that wants it.
    """

    max_rank: int
    units: int
    split_k: int


class Plan(NamedTuple):
    """How V·x is spread over programs.

    Attributes:
        max_rank: that of the :class:`DownShape`.
        block_m: pairs of a program.
        sub_blocks: so many are a block of the GEMM.
        blocks: blocks of ``block_m`` pairs, in use or not.
        rank_tiles: parts of the ranks.
        splits: parts of K, of ``chunk`` units each; the last ones may have less.
        chunk: units of a part.
        finish: whether the last program of a block and a rank tile adds the parts.
    """

    max_rank: int
    block_m: int
    sub_blocks: int
    blocks: int
    rank_tiles: int
    splits: int
    chunk: int
    finish: bool

    @property
    def counters(self) -> int:
        """Counters that the programs need."""
        return self.blocks * self.rank_tiles if self.finish else 0


def _finishes(dense: bool, tile_m: int) -> bool:
    """Return whether programs of V·x add its parts, where there are several, for GEMM tiles of ``tile_m`` pairs.

    Else each tile adds them, of all the ranks that it takes: 4 bytes a part instead of 2 in all. The few ranks of
    experts are added faster for few pairs than the last program would do it, for which all tiles wait.
    """
    return dense or tile_m > 32


def _splits(dense: bool, tile_m: int, split_k: int, programs: int, units: int, early: bool) -> int:
    """Return the parts of K, were there ``programs`` programs for each.

    Beside the GEMM's loop programs have time, but each takes the place of one of its tiles (of ``tile_m`` pairs, one
    of ``split_k`` parts of K). With few tokens a program of V·x has a quarter of a tile's units, and at most eight, and
    is done in time. Dense layers have so many ranks that their GEMM waits for V·x anyway: it gets as many programs as
    run at once, as long as each has four units and the last ones have little to add.
    """
    filling = cdiv(256 if early else 1024, programs)
    if dense:
        splits = min(512 // tile_m, units // 4, filling) if tile_m <= 64 else 1
    elif tile_m <= 32:
        splits = next_power_of_2(max(4 * split_k, cdiv(units, 8)))
    else:
        splits = 16 if filling >= 12 else 4 if filling >= 3 else 1
    splits = max(1, min(16, splits, 2 * units // 3))
    return 1 << (splits.bit_length() - 1)  # few different numbers: a GEMM that adds is compiled for each


def pipeline_stages(block_m: int) -> int:
    """Return the depth of the load pipeline."""
    return 4 if block_m <= 32 else 3


def plan(shape: DownShape, blocks: TokenBlocks, dense: bool, early: bool) -> Plan:
    """Return how V·x of ``blocks`` is spread over programs; those of a dense layer are its rows."""
    block_m = min(WHOLE, blocks.block_m)
    sub_blocks = blocks.block_m // block_m
    count = blocks.max_blocks * sub_blocks
    tiles = rank_tiles(shape.max_rank)
    if tiles == 0:
        return Plan(0, block_m, sub_blocks, count, 0, 1, shape.units, False)
    splits = _splits(dense, blocks.block_m, shape.split_k, count * tiles, shape.units, early)
    finish = splits > 1 and _finishes(dense, blocks.block_m)
    chunk = cdiv(shape.units, splits)
    return Plan(shape.max_rank, block_m, sub_blocks, count, tiles, splits, chunk, finish)
