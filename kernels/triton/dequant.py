"""Device code: from packed codes in registers to MMA operands.

Codes never become scaled weights. An operand holds, exactly, BIAS + q·ONE (first half of a unit) or
BIAS + 8·q·ONE (second half); the GEMM takes BIAS and the zero point off with the sums of the activations, and
multiplies the fp32 sum of each group by its scale. That costs less than scaling weights while few tokens share
them, and rounds nothing: an identity input returns fp32(s·(q - z)), rounded once.

- fp16: codes are the low mantissa bits of subnormals, which tensor cores multiply exactly: BIAS 0, ONE 2^-24.
- bf16: codes are or-ed to the mantissa of 128: BIAS 128, ONE 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

BF16_MAGIC = tl.constexpr(0x43004300)  # 128.0 in both halves of a word


@triton.jit
def _pair(bits, BF16: tl.constexpr):
    """int32 [.., 4] with a code in each half -> 16-bit floats [.., 4, 2]."""
    if BF16:
        bits = bits | BF16_MAGIC
        low = (bits & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        low = (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def quarter(x0, x1, x2, x3, ROWS: tl.constexpr):
    """Four pairs [ROWS, t, b] of two 16-wide steps -> operand [ROWS, 32], k = 16·i + 8·h + 2·t + b."""
    pairs = tl.join(tl.join(x0, x1), tl.join(x2, x3))  # [ROWS, t, b, h, i]
    return tl.reshape(tl.permute(pairs, (0, 4, 3, 1, 2)), (ROWS, 32))


@triton.jit
def half(x0, x1, x2, x3, x4, x5, x6, x7, ROWS: tl.constexpr):
    """Eight pairs [ROWS, t, b] of four 16-wide steps -> operand [ROWS, 64]."""
    low = tl.join(tl.join(x0, x1), tl.join(x2, x3))
    high = tl.join(tl.join(x4, x5), tl.join(x6, x7))
    pairs = tl.join(low, high)  # [ROWS, t, b, h, i0, i1]
    return tl.reshape(tl.permute(pairs, (0, 5, 4, 3, 1, 2)), (ROWS, 64))


@triton.jit
def first_pairs(w0, w1, w2, BF16: tl.constexpr):
    """Words [ROWS, 4] of a unit -> the pairs of codes 0..63, as BIAS + q·ONE."""
    return (
        _pair(w0 & 0x00070007, BF16),
        _pair(w1 & 0x00070007, BF16),
        _pair(w2 & 0x00070007, BF16),
        _pair((w0 >> 6) & 0x00070007, BF16),
        _pair((w1 >> 6) & 0x00070007, BF16),
        _pair((w2 >> 6) & 0x00070007, BF16),
        _pair((w0 >> 12) & 0x00070007, BF16),
        _pair((w1 >> 12) & 0x00070007, BF16),
    )


@triton.jit
def second_pairs(w0, w1, w2, BF16: tl.constexpr):
    """Words [ROWS, 4] of a unit -> the pairs of codes 64..127, as BIAS + 8·q·ONE."""
    spare = ((w0 >> 12) & 0x00080008) | ((w1 >> 11) & 0x00100010) | ((w2 >> 10) & 0x00200020)
    return (
        _pair(w0 & 0x00380038, BF16),
        _pair(w1 & 0x00380038, BF16),
        _pair(w2 & 0x00380038, BF16),
        _pair((w0 >> 6) & 0x00380038, BF16),
        _pair((w1 >> 6) & 0x00380038, BF16),
        _pair((w2 >> 6) & 0x00380038, BF16),
        _pair((w2 >> 9) & 0x00380038, BF16),
        _pair(spare, BF16),
    )


@triton.jit
def scale_and_zero(word):
    """int32 with fp16 scale (low half) and zero point (high half) -> both in fp32."""
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def add_group(acc, product, x_sum, scale, zero, FACTOR: tl.constexpr, BF16: tl.constexpr):
    """acc += scale·(Σ q·x - zero·Σ x), for one group of codes read at ``FACTOR`` times their value."""
    one: tl.constexpr = FACTOR if BF16 else FACTOR * 5.9604644775390625e-08
    if BF16:
        product = product - 128.0 * x_sum[None, :]
    return acc + (scale / one)[:, None] * (product - (zero * one)[:, None] * x_sum[None, :])


@triton.jit
def codes_along_rows(words_ptr, row_words, columns, mask):
    """Codes 0..7 at ``columns`` of rows of the checkpoint layout, int32 [columns, rows].

    ``row_words`` are the rows' first words. A code may straddle two words.
    """
    bit = 3 * columns
    shift = (bit % 32)[:, None]
    place = row_words[None, :] + (bit // 32)[:, None]
    low = tl.load(words_ptr + place, mask=mask, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(words_ptr + place + 1, mask=mask & (shift > 29), other=0).to(tl.uint32, bitcast=True)
    return ((low >> shift) | tl.where(shift > 29, high << (32 - shift), 0)).to(tl.int32, bitcast=True) & 7
