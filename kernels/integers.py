"""Symmetric integers of 8 or 4 bits in 32-bit words, as weight-only GEMMs of other makers take them.

Value i of a row is stored as q + 2^(bits - 1), from bit bits·i on of the row's little-endian bit stream: four or eight
values a word. compressed-tensors packs weights in the same way.
"""

from __future__ import annotations

import torch

WORD = 32


def pack_integers(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers along the last dimension.

    Args:
        values: from -2^(bits - 1) to 2^(bits - 1) - 1, any integer dtype, [..., K].
        bits: 8 or 4.

    Returns:
        int32 [..., K·bits/32].

    Raises:
        ValueError: K values do not fill whole words.
    """
    in_word = WORD // bits
    if values.shape[-1] % in_word:
        raise ValueError(f"cannot pack {values.shape[-1]} values of {bits} bits: not a multiple of {in_word}")
    codes = values.unflatten(-1, (-1, in_word)).to(torch.int32) + 2 ** (bits - 1)
    words = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=values.device)
    for index in range(in_word):
        words |= codes[..., index] << (bits * index)
    return words


def unpack_integers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo :func:`pack_integers`: int32 [..., K·bits/32] -> int8 [..., K]."""
    in_word = WORD // bits
    values = torch.empty(*words.shape, in_word, dtype=torch.int8, device=words.device)
    for index in range(in_word):
        values[..., index] = ((words >> (bits * index)) & (2**bits - 1)) - 2 ** (bits - 1)
    return values.flatten(-2)


def dequantize_integers(words: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the weights s·q, computed in float32.

    Args:
        words: int32 [..., N, K·bits/32].
        scale: s of each group of weights along K, [..., N, G]; one of the whole row where G is 1.
        bits: 8 or 4.

    Returns:
        float32 [..., N, K].
    """
    values = unpack_integers(words, bits).float().unflatten(-1, (scale.shape[-1], -1))
    return (values * scale.float().unsqueeze(-1)).flatten(-2)
