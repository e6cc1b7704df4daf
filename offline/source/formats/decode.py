"""The arithmetic of formats: codes and scales become float32 values. On whatever device the tensors lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from .scheme import Scheme

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Of the four bits of e2m1: sign, two bits of exponent, one of mantissa."""
_LEAST_POWER = 1 << 22
"""Bits of 2**-127 in float32, which is subnormal there."""


def dequantize_elements(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """Return codes that are numbers by themselves, FP8 or int8 [N, K], times their scales.

    Scales that are whole numbers, uint8, are exponents of powers of two.
    """
    scale = tensors[scheme.format.scale]
    return _times(tensors[scheme.format.codes].float(), scale if scale.is_floating_point() else _powers(scale), scheme)


def dequantize_packed(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """Return whole numbers of 4 or 8 bits, several in an int32, less their zero points, times their scales.

    Codes are packed along rows, int32 [N, K / 8] or [N, K / 4], zero points along columns, int32 [N / 8, G] or
    [N / 4, G]: the first in the lowest bits, each with half of its range added.
    """
    codes = _unpacked(tensors[scheme.format.codes], scheme.bits)
    if not scheme.symmetric:
        zero = _unpacked(tensors[str(scheme.format.zero)].T.contiguous(), scheme.bits).T[: len(codes)]
        for part, value in _by_block(codes, zero, scheme):
            part.sub_(value)
    return _times(codes, tensors[scheme.format.scale], scheme)


def dequantize_fp4(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """Return e2m1 numbers, two in a byte [N, K / 2], times powers of two by exponents, uint8 [N, K / 32]."""
    codes, exponents = tensors[scheme.format.codes], tensors[scheme.format.scale]
    pairs = torch.tensor(FP4_VALUES)[_nibbles(torch.arange(256, dtype=torch.uint8)[:, None]).int()].to(codes.device)
    bytes_of = codes.view(torch.uint8).int()
    return _times(torch.nn.functional.embedding(bytes_of, pairs).flatten(-2), _powers(exponents), scheme)


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2**(e - 127), float32, of exponents uint8 below 255; by their bits, so that no device rounds."""
    bits = exponents.int()
    return torch.where(bits == 0, _LEAST_POWER, bits << 23).view(torch.float32)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the halves of bytes, the lower first: uint8 [.., 2B] of uint8 [.., B]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the whole numbers of 4 or 8 bits in int32 [n, m] as float32 [n, 32m / bits]; they are around 0."""
    parts = packed.view(torch.uint8)
    return (_nibbles(parts) if bits == 4 else parts).float().sub_(2 ** (bits - 1))


def _times(codes: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return float32 codes [N, K], which are overwritten, times the scales of their blocks."""
    for part, value in _by_block(codes, scale.float(), scheme):
        part.mul_(value)
    return codes


def _by_block(codes: torch.Tensor, values: torch.Tensor, scheme: Scheme) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the parts of a matrix with blocks of one size as views [R, r, C, c], with the value of each, [R, 1, C, 1].

    There is one part, and one more at each side that has a smaller block at its end.
    """
    n, k = codes.shape
    rows, columns = scheme.block
    values = values.reshape(scheme.scales(n, k))
    for these_rows, row_blocks in _whole_and_rest(n, rows):
        for these_columns, column_blocks in _whole_and_rest(k, columns):
            value = values[row_blocks, column_blocks]
            part = codes[these_rows, these_columns]
            yield part.unflatten(1, (value.shape[1], -1)).unflatten(0, (value.shape[0], -1)), value[:, None, :, None]


def _whole_and_rest(size: int, block: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield the elements of a side, and the blocks that they are in: those of whole blocks, then those of the last."""
    block = min(block or size, size)
    whole = size // block
    yield slice(whole * block), slice(whole)
    if size % block:
        yield slice(whole * block, size), slice(whole, whole + 1)
