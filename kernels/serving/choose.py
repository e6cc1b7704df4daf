"""Which experts tokens go to, by their router's logits: the largest of a softmax, where no bias and no group has a say.

Few tokens are chosen for by the launch that sorts their pairs (:mod:`.prepare`), whose programs each do it for all of
them, which is to take less than a launch. More tokens, and more experts than a program's registers hold, have a launch
of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import LaunchMode, launch
from ..sizes import cdiv, next_power_of_2
from .routing import Routes, count_bins, end_blocks, find_blocks

FEW_TOKENS = 16
"""So many are chosen for where their pairs are sorted."""
FEW_EXPERTS = {2: 256, 4: 128}
"""Among so many, by the bytes of a logit."""
ROWS = 4
"""Tokens of a program of the launch for more: one for each of its warps, in which nothing waits for a barrier."""
LEAST, NARROW_LEAST = tl.constexpr(-0x7FFFFFFFFFFFFFFF), tl.constexpr(-0x7FFFFFFF)
"""Below the keys of all logits, those of minus infinity too, in 64 bits and in 32."""


class Choice(NamedTuple):
    """What is to be chosen by, and where to.

    Attributes:
        logits: of the router, [T, experts], contiguous.
        padding: uint8 [T], not 0 for rows that are no token's and go nowhere; None if all are tokens.
        renormalizes: whether a token's weights sum to 1; else they are its softmax over all experts.
        weights: fp32 [T, k], which are written, as are the ids of the routes.
    """

    logits: torch.Tensor
    padding: torch.Tensor | None
    renormalizes: bool
    weights: torch.Tensor


@triton.jit
def _load_logits(logits_ptr, padding_ptr, row, num_rows, EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """Load the logits of rows, fp32 [rows, BINS], and whether rows are tokens.

    Minus infinity stands beyond the experts, which come last of equals, and for NaN, whose order would be anything.
    """
    bins = tl.arange(0, BINS)
    is_token = row < num_rows
    if padding_ptr is not None:
        is_token &= tl.load(padding_ptr + row, mask=is_token, other=1) == 0
    place = logits_ptr + row[:, None].to(tl.int64) * EXPERTS + bins[None, :]
    mask = is_token[:, None] & (bins < EXPERTS)[None, :]
    logits = tl.load(place, mask=mask, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("-inf"))
    # the sum makes zeros of both signs one
    return tl.where(is_token[:, None], logits, 0.0) + 0.0, is_token


@triton.jit
def _reorder(bits):
    """The bits of floats as integers of the same order, and back; of positive and negative zero the second is less."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _choose(logits, expert, NARROW: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BINS: tl.constexpr):
    """Return ids and logits of the TOP_K largest of rows, [rows, SLOTS]; what was taken, [rows, BINS]; and the slot of
    ``expert`` in each row, or -1. Of equals the first is taken.

    A key has the logit's order in its upper bits, and in its lower ones what makes the first of equals the largest.
    Logits that were of 16 bits (``NARROW``) are alike in their lowest 13 bits, but for the sign: there is room for both
    in 32 bits.
    """
    bins = tl.arange(0, BINS)
    slots = tl.arange(0, SLOTS)
    ordered = _reorder(logits.to(tl.int32, bitcast=True))
    tl.static_assert(not NARROW or BINS <= 8192)
    least: tl.constexpr = NARROW_LEAST if NARROW else LEAST
    if NARROW:
        keys = (ordered & ~(BINS - 1)) | (BINS - 1 - bins)[None, :]
    else:
        keys = (ordered.to(tl.int64) << 32) | (BINS - 1 - bins).to(tl.int64)[None, :]
    ids = tl.zeros((logits.shape[0], SLOTS), tl.int32)
    values = tl.full((logits.shape[0], SLOTS), float("-inf"), tl.float32)
    own = tl.full((logits.shape[0],), -1, tl.int32)
    for slot in tl.static_range(TOP_K):
        best = tl.max(keys, 1)
        if NARROW:
            index = BINS - 1 - (best & (BINS - 1))
            order = tl.where(best < 0, best | (BINS - 1), best & ~(BINS - 1))
        else:
            index = BINS - 1 - (best & 0xFFFFFFFF).to(tl.int32)
            order = (best >> 32).to(tl.int32)
        value = _reorder(order).to(tl.float32, bitcast=True)
        keys = tl.where(bins[None, :] == index[:, None], least, keys)
        ids = tl.where((slots == slot)[None, :], index[:, None], ids)
        values = tl.where((slots == slot)[None, :], value[:, None], values)
        own = tl.where(index == expert, slot, own)
    return ids, values, keys == least, own


@triton.jit
def _store_choice(
    ids_ptr, weights_ptr, row, is_token, num_rows, logits, ids, values,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZES: tl.constexpr,
):  # fmt: skip
    """Store what was chosen: ids, -1 for rows that are no token's, and weights."""
    slots = tl.arange(0, SLOTS)
    largest = tl.max(values, 1)[:, None]
    shares = tl.exp(values - largest)  # 0 in slots beyond TOP_K
    total = tl.sum(shares if RENORMALIZES else tl.exp(logits - largest), 1)
    place = row[:, None] * TOP_K + slots[None, :]
    mask = (row < num_rows)[:, None] & (slots < TOP_K)[None, :]
    tl.store(ids_ptr + place, tl.where(is_token[:, None], ids, -1), mask=mask)
    tl.store(weights_ptr + place, tl.where(is_token[:, None], shares / total[:, None], 0.0), mask=mask)


@triton.jit
def choose_and_sort(
    logits_ptr, padding_ptr, ids_ptr, weights_ptr, pairs_ptr, experts_ptr, num_blocks_ptr, expert,
    num_rows, TOP_K: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, RENORMALIZES: tl.constexpr,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Choose for up to ROWS tokens, and write the blocks of one expert (if BLOCK_M > 0), in the order of tokens."""
    row = tl.arange(0, ROWS)
    logits, is_token = _load_logits(logits_ptr, padding_ptr, row, num_rows, EXPERTS, BINS)
    narrow: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    ids, values, taken, own = _choose(logits, expert, narrow, TOP_K, SLOTS, BINS)
    if expert == 0:
        _store_choice(ids_ptr, weights_ptr, row, is_token, num_rows, logits, ids, values, TOP_K, SLOTS, RENORMALIZES)
    if BLOCK_M > 0:
        counts = tl.sum((taken & is_token[:, None]).to(tl.int32), 0)
        first, own_blocks, own_pairs = find_blocks(num_blocks_ptr, tl.arange(0, BINS), counts, expert, BLOCK_M)
        mine = (own >= 0) & is_token
        place = first * BLOCK_M + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(pairs_ptr + place, row * TOP_K + own, mask=mine)
        end_blocks(pairs_ptr, experts_ptr, expert, first, own_blocks, own_pairs, num_rows * TOP_K, BLOCK_M)


@triton.jit(do_not_specialize=["num_rows"])
def _choose_kernel(
    logits_ptr, padding_ptr, ids_ptr, weights_ptr, num_rows, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, RENORMALIZES: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Choose for ROWS tokens.

    Its step in :mod:`.protocol` is ``CHOOSE``.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    logits, is_token = _load_logits(logits_ptr, padding_ptr, row, num_rows, EXPERTS, BINS)
    narrow: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    ids, values, _, _ = _choose(logits, 0, narrow, TOP_K, SLOTS, BINS)
    _store_choice(ids_ptr, weights_ptr, row, is_token, num_rows, logits, ids, values, TOP_K, SLOTS, RENORMALIZES)


def choose(choice: Choice, routes: Routes, mode: LaunchMode) -> None:
    """Choose in a launch of its own: writes the ids of the routes, and the weights of the choice."""
    tokens, experts = choice.logits.shape
    top_k = routes.ids.shape[1]
    launch(
        _choose_kernel,
        (cdiv(tokens, ROWS),),
        mode,
        choice.logits,
        choice.padding,
        routes.ids,
        choice.weights,
        tokens,
        TOP_K=top_k,
        SLOTS=next_power_of_2(top_k),
        ROWS=ROWS,
        RENORMALIZES=choice.renormalizes,
        EXPERTS=experts,
        BINS=count_bins(experts),
        PDL=mode.early,
        num_warps=4,
    )
