"""Integers of up to 8 bits in 32-bit words, as weight-only GEMMs of other makers and compressed-tensors store them.

Code i of a row is in word i // ⌊32/bits⌋, the first in the lowest bits: four, eight or ten codes of 8, 4 or 3 bits a
word, whose two highest bits are unused at 3. Symmetric integers are stored as codes, q + 2^(bits - 1).
"""

from __future__ import annotations

import torch

WORD = 32


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last dimension; what the last word has no codes for is 0.

    Args:
        codes: from 0 to 2^bits - 1, any integer dtype, [..., K].
        bits: of a code, 1 to 8.

    Returns:
        int32 [..., ⌈K/⌊32/bits⌋⌉].
    """
    in_word = WORD // bits
    missing = -codes.shape[-1] % in_word
    held = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    held = held.unflatten(-1, (-1, in_word))
    words = torch.zeros(held.shape[:-1], dtype=torch.int32, device=codes.device)
    for index in range(in_word):
        words |= held[..., index].to(torch.int32) << (bits * index)
    return words


def unpack_words(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Undo :func:`pack_words`.

    Args:
        words: int32 [..., ⌈columns/⌊32/bits⌋⌉].
        bits: of a code, 1 to 8.
        columns: codes of a row.

    Returns:
        uint8 [..., columns].
    """
    return _unpack(words, bits, 0, torch.uint8)[..., :columns]


def pack_integers(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack symmetric integers along the last dimension.

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
    return pack_words(values.to(torch.int32) + 2 ** (bits - 1), bits)


def unpack_integers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo :func:`pack_integers`: int32 [..., K·bits/32] -> int8 [..., K]."""
    return _unpack(words, bits, 2 ** (bits - 1), torch.int8)


def _unpack(words: torch.Tensor, bits: int, zero: int, dtype: torch.dtype) -> torch.Tensor:
    """Return all codes of words less ``zero``: ``dtype`` [..., K]."""
    in_word = WORD // bits
    values = torch.empty(*words.shape, in_word, dtype=dtype, device=words.device)
    for index in range(in_word):
        codes = (words >> (bits * index)) & (2**bits - 1)  # >> of a negative word fills with ones, which the mask takes
        values[..., index] = codes - zero if zero else codes
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
