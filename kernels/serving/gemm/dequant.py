"""Device code: from packed codes in registers to MMA operands.

``code_operand`` holds, exactly, BIAS + q·ONE:

- fp16: codes are the low mantissa bits of subnormals, which tensor cores multiply exactly: BIAS 0, ONE 2^-24 in the
  first half of a unit, and 2^-21 in the second, whose codes stand three bits higher.
- bf16: codes are or-ed to the mantissa of 128 in the first half, and of 16 in the second: BIAS 128 or 16, ONE 1.
  (``WIDE``: of an fp32 128 or 16, one instruction a code.)

From there three ways lead to s·(q - z), s being what the layout holds, a scale times the expert's power of two:

- few tokens: the operand is multiplied as it is, and BIAS, zero point and scale are applied to the fp32 sum of
  each group (:func:`add_group`). That costs less than scaling weights which few tokens share, and rounds nothing.
- many tokens: the operand is scaled in fp32 and rounded once (:func:`scaled`).
- many tokens of a bf16 model: fp16 operands, scaled two at a time (:func:`fast_operand`), which the power of two keeps
  within fp16; the activations go to fp16 with a power of two a row, which loses nothing.

The first two return fp32(s·(q - z)), rounded once, for an identity input; the last rounds s·z before that, to 11 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import config
from .proved import warn_if_unproved

warn_if_unproved(triton.__version__)

_FP16_ONE = tl.constexpr(5.9604644775390625e-08)  # 2^-24
WARPGROUP_TOKENS = tl.constexpr(config.WARPGROUP_TOKENS)
"""Tokens that a tile must have for Triton to let four warps multiply together, where the device can."""


@triton.jit
def halves(word, dtype: tl.constexpr):
    """The two values of 16 bits that an int32 holds, the low one first."""
    low = (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    return low, (word >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _and_or_bf16(word, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Codes of both halves in the mantissa of bf16 128, or 16 where they stand three bits higher.

    ASM: one three-input logic instruction, which compilers do not form from two constants by themselves.
    """
    if ASM and HIGH:
        asm: tl.constexpr = "lop3.b32 $0, $1, 0x00380038, 0x41804180, 0xEA;"
        return tl.inline_asm_elementwise(asm, "=r,r", [word], tl.int32, is_pure=True, pack=1)
    if ASM:
        asm_low: tl.constexpr = "lop3.b32 $0, $1, 0x00070007, 0x43004300, 0xEA;"
        return tl.inline_asm_elementwise(asm_low, "=r,r", [word], tl.int32, is_pure=True, pack=1)
    return (word & (0x00380038 if HIGH else 0x00070007)) | (0x41804180 if HIGH else 0x43004300)


@triton.jit
def _and_or_wide(word, HIGH: tl.constexpr, ASM: tl.constexpr):
    """The code of the upper half in the mantissa of fp32 128 or 16."""
    if ASM and HIGH:
        asm: tl.constexpr = "lop3.b32 $0, $1, 0x00380000, 0x41800000, 0xEA;"
        return tl.inline_asm_elementwise(asm, "=r,r", [word], tl.int32, is_pure=True, pack=1)
    if ASM:
        asm_low: tl.constexpr = "lop3.b32 $0, $1, 0x00070000, 0x43000000, 0xEA;"
        return tl.inline_asm_elementwise(asm_low, "=r,r", [word], tl.int32, is_pure=True, pack=1)
    return (word & (0x00380000 if HIGH else 0x00070000)) | (0x41800000 if HIGH else 0x43000000)


@triton.jit
def _codes(words, HIGH: tl.constexpr, BF16: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr):
    """int32 [..] -> floats [.., 2] of the codes at bits 0 and 16 (HIGH: 3 and 19)."""
    if WIDE:
        low = _and_or_wide(words << 16, HIGH, ASM).to(tl.float32, bitcast=True)
        high = _and_or_wide(words, HIGH, ASM).to(tl.float32, bitcast=True)
    else:
        dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        bits = _and_or_bf16(words, HIGH, ASM) if BF16 else words & (0x00380038 if HIGH else 0x00070007)
        low, high = halves(bits, dtype)
    return tl.join(low, high)


@triton.jit
def _shifted_words(w0, w1, w2, HALF: tl.constexpr, ASM: tl.constexpr):
    """Words [ROWS, t] of a unit -> [ROWS, t, h, i0, i1], pairs of a half at bits 0 and 16 (second half: 3 and 19)."""
    if HALF == 0:
        v6 = w0 >> 12
        v7 = w1 >> 12
    elif ASM:
        v6 = w2 >> 9
        # each takes some bits of one word and the others of another, of which all but three are masked later on
        first: tl.constexpr = "lop3.b32 $0, $1, 0x00080008, $2, 0xE2;"
        both: tl.constexpr = "lop3.b32 $0, $1, 0x00180018, $2, 0xE2;"
        v7 = tl.inline_asm_elementwise(first, "=r,r,r", [w0 >> 12, w1 >> 11], tl.int32, is_pure=True, pack=1)
        v7 = tl.inline_asm_elementwise(both, "=r,r,r", [v7, w2 >> 10], tl.int32, is_pure=True, pack=1)
    else:
        v6 = w2 >> 9
        v7 = ((w0 >> 12) & 0x00080008) | ((w1 >> 11) & 0x00100010) | ((w2 >> 10) & 0x00200020)
    low = tl.join(tl.join(w0, w1), tl.join(w2, w0 >> 6))
    return tl.join(low, tl.join(tl.join(w1 >> 6, w2 >> 6), tl.join(v6, v7)))


@triton.jit
def operand_order(SIZE: tl.constexpr, WARP: tl.constexpr):
    """Place in memory of each k of an operand, [SIZE], in which the other operand must be loaded.

    A warp's MMA gives a lane four k in a row of each 16 where 16-bit values were joined, by Triton's choice: with
    ``WARP`` those are the codes that the lane holds, k = 16·i + 4·t + 2·h + b, which stand at 16·i + 8·h + 2·t + b.
    """
    k = tl.arange(0, SIZE)
    if WARP:
        k = k // 16 * 16 + k // 2 % 2 * 8 + k // 4 % 4 * 2 + k % 2
    return k


@triton.jit
def _operand(pairs, ROWS: tl.constexpr, WARP: tl.constexpr):
    """[ROWS, t, h, i0, i1, b] -> MMA operand [ROWS, 64] in the order of :func:`operand_order`, which moves nothing."""
    operand = tl.permute(pairs, (0, 4, 3, 1, 2, 5)) if WARP else tl.permute(pairs, (0, 4, 3, 2, 1, 5))
    return tl.reshape(operand, (ROWS, 64))


@triton.jit
def code_operand(
    w0, w1, w2, HALF: tl.constexpr, BF16: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, WARP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Words [ROWS, 4] of a unit -> the 64 codes of a half, BIAS + q·ONE, as an operand [ROWS, 64].

    WIDE: in fp32, for :func:`scaled`; else in 16 bits.
    """
    return _operand(_codes(_shifted_words(w0, w1, w2, HALF, ASM), HALF, BF16, WIDE, ASM), ROWS, WARP)


@triton.jit
def quarter_operand(w0, w1, w2, QUARTER: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, ROWS: tl.constexpr):
    """Words [ROWS, 4] of a unit -> 32 of its codes, as an operand [ROWS, 32]."""
    first, second = tl.split(_shifted_words(w0, w1, w2, QUARTER // 2, ASM))  # by i1
    words = first if QUARTER % 2 == 0 else second
    pairs = _codes(words, QUARTER // 2, BF16, False, ASM)  # [ROWS, t, h, i0, b]
    return tl.reshape(tl.permute(pairs, (0, 3, 2, 1, 4)), (ROWS, 32))


@triton.jit
def scale_and_zero(word):
    """int32 with fp16 scale (low half) and zero point (high half) -> both in fp32."""
    scale, zero = halves(word, tl.float16)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def add_group(acc, product, x_sum, scale, zero, HALF: tl.constexpr, BF16: tl.constexpr):
    """acc += scale·(Σ q·x - zero·Σ x), from the product with the operand of one group."""
    one: tl.constexpr = 1.0 if BF16 else (8.0 if HALF else 1.0) * _FP16_ONE
    bias: tl.constexpr = (16.0 if HALF else 128.0) if BF16 else 0.0
    return acc + (scale * (1.0 / one))[:, None] * (product - (bias + zero * one)[:, None] * x_sum[None, :])


@triton.jit
def scale_of_codes(scale, zero, HALF: tl.constexpr, BF16: tl.constexpr, UNIT: tl.constexpr = 1.0):
    """(factor, offset) in fp32 with scale·(q - zero)·UNIT = codes·factor - offset."""
    one: tl.constexpr = 1.0 if BF16 else (8.0 if HALF else 1.0) * _FP16_ONE
    bias: tl.constexpr = (16.0 if HALF else 128.0) if BF16 else 0.0
    factor = scale * (UNIT / one)
    return factor, factor * (bias + zero * one)


@triton.jit
def scaled(codes, scale, zero, HALF: tl.constexpr, BF16: tl.constexpr, UNIT: tl.constexpr = 1.0):
    """Operand of codes [ROWS, k] -> scale·(q - zero)·UNIT in fp32, rounded once to 16 bits.

    fp16: the product inside the FMA and zero·scale are exact. bf16: the FMA takes BIAS off as well, which costs
    at most 2^-17 of a step.
    """
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    factor, offset = scale_of_codes(scale, zero, HALF, BF16, UNIT)
    return (codes.to(tl.float32) * factor[:, None] - offset[:, None]).to(dtype)


@triton.jit
def unit_of_scales(exponent, SHIFT: tl.constexpr):
    """2^(SHIFT - exponent) in fp32: the unit of sums of weights that hold scales times 2^(exponent - SHIFT)."""
    return ((127 + SHIFT - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _fast_scales(word, HALF: tl.constexpr, ASM: tl.constexpr):
    """int32 [ROWS] with scale s and zero point z -> fp16 pairs of what codes are multiplied with, and of -s·z·2^-24.

    All but the latter is exact, unless s is less than 2^-15.
    """
    if ASM:
        if HALF == 0:
            asm_low: tl.constexpr = "prmt.b32 $0, $1, 0, 0x1010;"
            scale = tl.inline_asm_elementwise(asm_low, "=r,r", [word], tl.int32, is_pure=True, pack=1)
        else:
            asm_high: tl.constexpr = (
                "{ .reg .b32 t, c; prmt.b32 t, $1, 0, 0x1010; mov.b32 c, 0x30003000; mul.rn.f16x2 $0, t, c; }"
            )
            scale = tl.inline_asm_elementwise(asm_high, "=r,r", [word], tl.int32, is_pure=True, pack=1)
        # s·2^-14 and -z·2^-10, then their product twice
        asm: tl.constexpr = (
            "{ .reg .b32 t, c; mov.b32 c, 0x94000400; mul.rn.f16x2 t, $1, c; prmt.b32 c, t, 0, 0x1032;"
            " mul.rn.f16x2 $0, t, c; }"
        )
        offset = tl.inline_asm_elementwise(asm, "=r,r", [word], tl.int32, is_pure=True, pack=1)
    else:
        s, z = scale_and_zero(word)
        scale = _pair(s * (0.125 if HALF else 1.0))
        small = (s * (1.0 / 16384)).to(tl.float16).to(tl.float32)
        offset = _pair((z * (-1.0 / 1024)).to(tl.float16).to(tl.float32) * small)
    return scale, offset


@triton.jit
def _pair(value):
    """fp32 -> the same fp16 in both halves of an int32."""
    bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def _fast_weights(words, scale, offset, HIGH: tl.constexpr, ASM: tl.constexpr):
    """int32 [..] -> fp16 [.., 2]: q·s - s·z of the codes at bits 0 and 16 (HIGH: 3 and 19).

    Codes are subnormals as they stand, so that two weights take two instructions: an AND, and an FMA that rounds once.
    """
    if ASM:
        if HIGH:
            bits = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $1, 0x00380038; fma.rn.f16x2 $0, t, $2, $3; }",
                "=r,r,r,r",
                [words, scale, offset],
                tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $1, 0x00070007; fma.rn.f16x2 $0, t, $2, $3; }",
                "=r,r,r,r",
                [words, scale, offset],
                tl.int32,
                is_pure=True,
                pack=1,
            )
        low, high = halves(bits, tl.float16)
    else:
        codes = words >> 3 if HIGH else words
        one: tl.constexpr = (8.0 if HIGH else 1.0) * _FP16_ONE
        s, _ = scale_and_zero(scale)
        c, _ = scale_and_zero(offset)
        low = ((codes & 7).to(tl.float32) * (s * one) + c).to(tl.float16)
        high = (((codes >> 16) & 7).to(tl.float32) * (s * one) + c).to(tl.float16)
    return tl.join(low, high)


@triton.jit
def fast_operand(w0, w1, w2, scale_zero, HALF: tl.constexpr, ASM: tl.constexpr, WARP: tl.constexpr, ROWS: tl.constexpr):
    """Words [ROWS, 4] of a unit and int32 [ROWS] -> fp16 operand [ROWS, 64] of s·(q - z)·2^-24, for s up to 2^16.

    The FMA rounds once; before it s·z was rounded to 11 bits.
    """
    scale, offset = _fast_scales(scale_zero, HALF, ASM)
    scale = scale[:, None, None, None, None]
    offset = offset[:, None, None, None, None]
    return _operand(_fast_weights(_shifted_words(w0, w1, w2, HALF, ASM), scale, offset, HALF, ASM), ROWS, WARP)


@triton.jit
def finished(acc, ASM: tl.constexpr):
    """acc, with every product that adds to it waited for.

    A warpgroup's MMA reads its A operand from registers while the warp goes on. Triton (3.6) lets the last product of a
    loop's turn run into the next one, which writes those registers anew: results are then wrong now and then. A use of
    the sum by anything but a product makes it wait; with ASM one that emits nothing. See :mod:`.proved`.
    """
    if ASM:
        return tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, is_pure=False, pack=1)
    return acc + 0.0
