"""Which tile a GEMM runs with, by shape and tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .. import tuned
from ..launch import processors, shared_memory
from .gemm.config import GemmConfig
from .layout import UNIT, KernelWeights

BLOCK_N = 128
SCALING_TOKENS = 72
"""Scaling a tile's weights takes as long as the products of so many tokens, by the times of tiles of 64 and of 128."""
THREE_TILES = 168
"""Registers of a thread with which three tiles of four warps fit on a multiprocessor."""
TUNED_KEYS = ("gate_up", "down")
"""An entry of a tuned file holds the tiles of the two GEMMs under these keys."""


class MoEShape(NamedTuple):
    """The sizes of a layer on this process: local experts, hidden and intermediate size, group sizes of both GEMMs."""

    experts: int
    hidden: int
    intermediate: int
    first_group: int
    second_group: int


def moe_configs(tokens: int, top_k: int, shape: MoEShape, device: torch.device) -> tuple[GemmConfig, GemmConfig]:
    """Return the tiles of the two GEMMs of a MoE layer: from a tuned file, else by :func:`heuristic_configs`.

    Raises:
        ValueError: the tuned file of this shape and device is broken.
    """
    entry = tuned.find(shape.experts, shape.intermediate, tokens, device)
    if entry is None:
        return heuristic_configs(tokens * top_k, shape, device)
    try:
        first, second = (GemmConfig(**entry[gemm]) for gemm in TUNED_KEYS)
    except (KeyError, TypeError) as error:
        name = tuned.file_name(shape.experts, shape.intermediate, "…")
        raise ValueError(f"{name}, {tokens} tokens: not a pair of tiles ({error}); tune again or remove it") from None
    return first, second


def heuristic_configs(num_pairs: int, shape: MoEShape, device: torch.device) -> tuple[GemmConfig, GemmConfig]:
    """Return tiles for a mean load of the experts. The two GEMMs of a layer agree in block_m."""
    mean = num_pairs / shape.experts
    block_m = _block_m(mean, min(shape.first_group, shape.second_group), device)
    tail_m = _tail(block_m, mean)
    # blocks that have pairs, on average, were the routes uniform
    active = shape.experts * (1 - (1 - 1 / shape.experts) ** num_pairs)
    blocks = max(active, num_pairs / block_m)
    common = (blocks, tail_m, device)
    first = _config(block_m, shape.intermediate, 2, triton.cdiv(shape.hidden, UNIT), shape.first_group, *common)
    second = _config(block_m, shape.hidden, 1, triton.cdiv(shape.intermediate, UNIT), shape.second_group, *common)
    if first.scaled:  # what makes the second GEMM's input in fp16 reads whole sums
        three_fit = block_m == 64 and 3 * _pipeline_bytes(64, first.num_stages) <= shared_memory(device)
        first = first._replace(split_k=1, max_registers=THREE_TILES if three_fit else None)
    return first, second


def linear_config(rows: int, layer: KernelWeights, group_size: int, device: torch.device) -> GemmConfig:
    """Return the tile of a dense layer: many tokens take the tile that leaves least of the last round idle."""
    sizes = [size for size in (16, 32, 64) if rows <= size]
    sizes = sizes or [size for size in (64, 128) if size <= _largest_block(device)]
    if group_size == 32:
        sizes = [min(sizes[0], 64)]
    tiles = {size: triton.cdiv(layer.columns, BLOCK_N) * triton.cdiv(rows, size) for size in sizes}

    def cost(size: int) -> int:
        """Return the time of all rounds of tiles, in the time of one token's products."""
        return triton.cdiv(tiles[size], _resident(size) * processors(device)) * (size + SCALING_TOKENS)

    block_m = sizes[0] if rows <= 64 else min(sizes, key=cost)
    split_k = 1
    while 2 * split_k * tiles[block_m] <= _resident(block_m) * processors(device) and layer.units >= 8 * split_k:
        split_k *= 2
    # only one block is not whole: its size matters less than kernels to compile
    return _tile(block_m, min(8, split_k), group_size, _tails(block_m)[0], device)


def _block_m(mean: float, group_size: int, device: torch.device) -> int:
    """Return the tokens of a tile for so many pairs an expert."""
    if mean <= 14:
        return 16
    if mean <= 24:
        return 32
    return 64 if group_size == 32 or mean <= 80 else _largest_block(device)


def _largest_block(device: torch.device) -> int:
    """Return the most tokens of a tile whose load pipeline fits into shared memory."""
    return 128 if _pipeline_bytes(128, 2) <= shared_memory(device) else 64


def _pipeline_bytes(block_m: int, stages: int) -> int:
    """Return the bytes of shared memory that the load pipeline takes.

    These are ``stages`` units of activations, and one unit less of codes with their scales and zero points: the current
    ones are in registers already.
    """
    return stages * 2 * UNIT * block_m + (stages - 1) * (3 * 16 + 4 * 4) * BLOCK_N


def _resident(block_m: int) -> int:
    """Return the tiles that fit on a multiprocessor at once, which registers limit.

    Two at least: one scales weights while products of another run.
    """
    return 3 if block_m == 16 else 2


def _stages(block_m: int, device: torch.device) -> int:
    """Return the depth of the load pipeline: three or four, less where the tiles of a multiprocessor would not fit."""
    deepest = 4 if block_m <= 32 else 3
    room = shared_memory(device) // _resident(block_m)
    return max((stages for stages in range(2, deepest + 1) if _pipeline_bytes(block_m, stages) <= room), default=2)


def _config(
    block_m: int,
    width: int,
    parts: int,
    units: int,
    group_size: int,
    blocks: float,
    tail_m: int,
    device: torch.device,
) -> GemmConfig:
    """Return the tile for so many blocks of tokens that have work.

    K is split until there are ``rounds`` times as many tiles as fit on the device at once: few rounds leave
    multiprocessors idle in the last one.
    """
    rounds = 3 if _scaled(block_m, group_size) else 2
    programs = triton.cdiv(width, BLOCK_N) * parts * blocks
    split_k = 1
    while (
        split_k < 8 and programs * split_k < rounds * _resident(block_m) * processors(device) and units >= 8 * split_k
    ):
        split_k *= 2
    return _tile(block_m, split_k, group_size, tail_m, device)


def _tails(block_m: int) -> tuple[int, ...]:
    """Return sizes of the tile for an expert's last pairs, a quarter and half of the others'; 0 for none."""
    return (max(16, block_m // 4), block_m // 2) if block_m > 16 else (0,)


def _tail(block_m: int, mean: float) -> int:
    """Return the size that costs less over the likely loads of an expert."""
    loads = [round(mean + z * mean**0.5) for z in (-1.3, -0.5, 0.0, 0.5, 1.3)]

    def cost(tail: int) -> int:
        last = [load % block_m for load in loads]
        return sum(0 if rest == 0 else (tail if rest <= tail else block_m) + SCALING_TOKENS for rest in last)

    return min(_tails(block_m), key=cost)


def _scaled(block_m: int, group_size: int) -> bool:
    return block_m >= 64 and group_size != 32


def _tile(block_m: int, split_k: int, group_size: int, tail_m: int, device: torch.device) -> GemmConfig:
    scaled = _scaled(block_m, group_size)
    return GemmConfig(
        block_m=block_m,
        block_n=BLOCK_N,
        split_k=split_k,
        scaled=scaled,
        num_warps=4,
        num_stages=_stages(block_m, device),
        group_blocks=4 if scaled else 1,
        tail_m=tail_m,
    )
