"""3-bit codes in the checkpoint layout, and the values that codes and factors stand for.

32 codes fill exactly three 32-bit words: code i of a row is bits 3i..3i+2 of the row's little-endian bit
stream. Codes 10 and 21 of each 32 straddle two words.
"""

from __future__ import annotations

import torch

MAX_CODE = 7
CODES_PER_UNIT = 32
WORDS_PER_UNIT = 3
_EIGHTS, _IN_EIGHT = 4, 8
"""Eight codes make 24 bits, and four times 24 bits three words."""
FACTOR_ZERO = 4
"""Code that stands for 0 in 3-bit factors: w = scale·(q - 4)."""


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack 3-bit codes along the last dimension.

    Args:
        codes: integers in 0..7, shape [..., K], K a multiple of 32.

    Returns:
        int32 [..., 3K/32].

    Raises:
        ValueError: K is not a multiple of 32.
    """
    if codes.shape[-1] % CODES_PER_UNIT:
        raise ValueError(f"cannot pack {codes.shape[-1]} codes: not a multiple of {CODES_PER_UNIT}")
    eights = codes.unflatten(-1, (codes.shape[-1] // CODES_PER_UNIT, _EIGHTS, _IN_EIGHT))
    bits = torch.zeros(eights.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(_IN_EIGHT):
        bits |= eights[..., i].to(torch.int32) << (3 * i)
    a, b, c, d = bits.unbind(-1)
    return torch.stack([a | (b << 24), (b >> 8) | (c << 16), (c >> 16) | (d << 8)], -1).flatten(-2)


def unpack_codes(words: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_codes`: int32 [..., 3K/32] -> uint8 [..., K].

    Raises:
        ValueError: the last dimension is not a multiple of 3 words.
    """
    if words.shape[-1] % WORDS_PER_UNIT:
        raise ValueError(f"cannot unpack {words.shape[-1]} words: not a multiple of {WORDS_PER_UNIT}")
    a, b, c = words.unflatten(-1, (words.shape[-1] // WORDS_PER_UNIT, WORDS_PER_UNIT)).unbind(-1)
    # >> of a negative int32 fills with ones: keep the bits that came from this word
    bits = torch.stack([a, ((a >> 24) & 0xFF) | (b << 8), ((b >> 16) & 0xFFFF) | (c << 16), c >> 8], -1)
    codes = torch.empty(*bits.shape, _IN_EIGHT, dtype=torch.uint8, device=words.device)
    for i in range(_IN_EIGHT):
        codes[..., i] = (bits >> (3 * i)) & MAX_CODE
    return codes.flatten(-3)


def dequantize(
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the weights s·(q - z), computed in ``dtype`` (float32, or float64 for unrounded products).

    Args:
        words: packed codes, int32 [..., N, 3K/32].
        scale: s, [..., N, K/group_size].
        zero: z, real-valued, [..., N, K/group_size].
        group_size: codes along K that share one scale and zero point.
        dtype: float32 or float64.

    Returns:
        ``dtype`` [..., N, K].
    """
    codes = unpack_codes(words).to(dtype).unflatten(-1, (scale.shape[-1], group_size))
    return (scale.to(dtype).unsqueeze(-1) * (codes - zero.to(dtype).unsqueeze(-1))).flatten(-2)


def dequantize_factor(
    factor: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    group_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the values of a low-rank factor, computed in ``dtype``.

    Args:
        factor: rank-major rows; ``bits`` 16: floating point [..., r, C]; 8: int8 [..., r, C];
            3: packed codes, int32 [..., r, 3C/32].
        scale: [..., r, C/group_size]; ignored where ``bits`` is 16.
        bits: 3, 8 or 16.
        group_size: values along a row that share one scale.
        dtype: float32 or float64.

    Returns:
        ``dtype`` [..., r, C].
    """
    if bits == 16:
        return factor.to(dtype)
    if scale is None:
        raise ValueError(f"a {bits}-bit factor needs its scales")
    values = unpack_codes(factor).to(dtype) - FACTOR_ZERO if bits == 3 else factor.to(dtype)
    return (values.unflatten(-1, (scale.shape[-1], group_size)) * scale.to(dtype).unsqueeze(-1)).flatten(-2)
