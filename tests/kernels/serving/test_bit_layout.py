"""Where a code stands in its words: the worked example, the packing, and the device code that takes codes out."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from vllm_milo.kernels.serving.gemm.dequant import code_operand, fast_operand, operand_order, quarter_operand
from vllm_milo.kernels.serving.layout import EXAMPLE, from_units, to_units


@triton.jit
def take_codes(words, halves, quarters, fast, WARP: tl.constexpr, ROWS: tl.constexpr):
    """The 128 codes of each of ROWS units, by halves, by quarters, and as weights of scale 1 and zero point 0.

    Each is stored where the other operand would be loaded from.
    """
    place = tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    w0 = tl.load(words + place)
    w1 = tl.load(words + ROWS * 4 + place)
    w2 = tl.load(words + 2 * ROWS * 4 + place)
    one = tl.full((ROWS,), 0x3C00, tl.int32)  # fp16 1 in the low half, 0 in the high one
    for half in tl.static_range(2):
        target = tl.arange(0, ROWS)[:, None] * 128 + half * 64 + operand_order(64, WARP)[None, :]
        tl.store(halves + target, code_operand(w0, w1, w2, half, False, False, False, WARP, ROWS))
        tl.store(fast + target, fast_operand(w0, w1, w2, one, half, False, WARP, ROWS))
    for quarter in tl.static_range(4):
        target = tl.arange(0, ROWS)[:, None] * 128 + quarter * 32 + tl.arange(0, 32)[None, :]
        tl.store(quarters + target, quarter_operand(w0, w1, w2, quarter, False, False, ROWS))


def taken(words: torch.Tensor, device: str, by_warps: bool) -> list[torch.Tensor]:
    """The codes that the device finds in the words [3, rows, 4] of units, three times [rows, 128]."""
    rows = words.shape[1]
    found = [torch.empty(rows, 128, dtype=torch.float16, device=device) for _ in range(3)]
    take_codes[(1,)](words.contiguous().to(device), *found, WARP=by_warps, ROWS=rows)
    # the operand holds q times 2^-24 (second half: 2^-21) exactly
    units = torch.tensor([2.0**24, 2.0**21]).repeat_interleave(64)
    return [found[0].float().cpu() * units, found[1].float().cpu() * units, found[2].float().cpu() * 2.0**24]


def example_words(value: int) -> torch.Tensor:
    """int32 [3, 16, 4]: row r holds ``value`` as the code that comes r-th in the example, by the example's bits."""
    words = torch.zeros(3, 16, 4, dtype=torch.int64)
    for row, bits in enumerate(EXAMPLE.values()):
        for number, (word, bit) in enumerate(zip(bits.word, bits.bit, strict=True)):
            words[word, row, bits.lane] |= (value >> number & 1) << bit
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def example_codes(value: int) -> torch.Tensor:
    """uint8 [16, 128], likewise."""
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    for row, k in enumerate(EXAMPLE):
        codes[row, k] = value
    return codes


@pytest.mark.parametrize("value", [1, 2, 4, 7])
def test_packing_follows_the_example(value: int):
    assert torch.equal(to_units(example_codes(value), 16)[0, 0], example_words(value))
    assert torch.equal(from_units(example_words(value)[None, None]), example_codes(value))


@pytest.mark.parametrize("by_warps", [False, True])
@pytest.mark.parametrize("value", [1, 2, 4, 7])
def test_the_device_follows_the_example(value: int, by_warps: bool, kernel_device: str):
    for found in taken(example_words(value), kernel_device, by_warps):
        assert torch.equal(found, example_codes(value).float())


@pytest.mark.parametrize("by_warps", [False, True])
def test_the_device_finds_each_code(by_warps: bool, kernel_device: str):
    """Every code by itself, then all of them at random."""
    each = 7 * torch.eye(128, dtype=torch.uint8)
    for codes in (each, torch.randint(0, 8, (128, 128), dtype=torch.uint8)):
        for found in taken(to_units(codes, 128)[0, 0], kernel_device, by_warps):
            assert torch.equal(found, codes.float())
