"""Device code: activations in the order in which the lanes of a warp's MMA take them, where tokens are fewest."""

from __future__ import annotations

import triton
import triton.language as tl

from .dequant import halves


@triton.jit
def lane_order(SIZE: tl.constexpr):
    """Place of each k of SIZE, a multiple of 32, where activations lie as the lanes of a warp's MMA take them, [SIZE].

    Of 32 values a lane takes 8 in a row there, for two MMAs: k = 16·i0 + 8·h + 2·t + b stands at 8·t + 4·h + 2·i0 + b.
    """
    k = tl.arange(0, SIZE)
    return k // 32 * 32 + k // 2 % 4 * 8 + k // 8 % 2 * 4 + k // 16 % 2 * 2 + k % 2


@triton.jit
def load_lanes(x_rows, valid, dtype: tl.constexpr, BLOCK_M: tl.constexpr):
    """Both halves of a unit of x [64, BLOCK_M], from rows in :func:`lane_order` [BLOCK_M], two values a word.

    One load from shared memory brings a lane the pairs of registers of two MMAs. From rows in the order of k the two
    registers of one MMA come from two loads, and every eighth instruction of the loop only moves them together.
    """
    part = tl.arange(0, 4)  # of 32 values
    word = tl.arange(0, 16)  # t, h, i0
    place = x_rows[None, :, None] + (part * 16)[:, None, None] + word[None, None, :]
    mask = valid[None, :, None] & (part >= 0)[:, None, None] & (word >= 0)[None, None, :]
    words = tl.load(place, mask=mask, other=0)
    low, high = halves(words, dtype)
    pairs = tl.reshape(tl.join(low, high), (2, 2, BLOCK_M, 4, 2, 2, 2))  # half, i1, m, t, h, i0, b
    first, second = tl.split(tl.permute(pairs, (1, 5, 3, 4, 6, 2, 0)))
    return tl.reshape(first, (64, BLOCK_M)), tl.reshape(second, (64, BLOCK_M))
