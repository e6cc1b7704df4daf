"""The arithmetic of formats: codes and scales become float32 values. On whatever device the tensors lie."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .scheme import Scheme

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Of the four bits of e2m1: sign, two bits of exponent, one of mantissa."""
E8M0_BIAS = 127
"""Of scales that are an exponent alone."""


def dequantize_elements(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """Return codes that are numbers by themselves, FP8 or int8 [N, K], times their scales."""
    return _times(tensors[scheme.format.codes].float(), tensors[scheme.format.scale], scheme)


def dequantize_packed(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """Return whole numbers of 4 or 8 bits, several in an int32, less their zero points, times their scales.

    Codes are packed along rows, int32 [N, K / 8] or [N, K / 4], zero points along columns, int32 [N / 8, G] or
    [N / 4, G]: the first in the lowest bits, each with half of its range added.
    """
    codes = _unpacked(tensors[scheme.format.codes], scheme.bits)
    if not scheme.symmetric:
        zero = _unpacked(tensors[str(scheme.format.zero)].T.contiguous(), scheme.bits).T[: len(codes)]
        codes -= _spread(zero, scheme, codes.shape)
    return _times(codes, tensors[scheme.format.scale], scheme)


def dequantize_fp4(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """Return e2m1 numbers, two in a byte, uint8 [N, K / 2], times powers of two by exponents, uint8 [N, K / 32]."""
    codes, exponents = tensors[scheme.format.codes], tensors[scheme.format.scale]
    values = torch.tensor(FP4_VALUES, device=codes.device)[_nibbles(codes).int()]
    scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - E8M0_BIAS)
    return _times(values, scale, scheme)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the halves of bytes, the lower first: uint8 [.., 2B] of uint8 [.., B]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the whole numbers of 4 or 8 bits in int32 [n, m] as float32 [n, 32m / bits]; they are around 0."""
    parts = packed.view(torch.uint8)
    return (_nibbles(parts) if bits == 4 else parts).float().sub_(2 ** (bits - 1))


def _times(codes: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return float32 codes [N, K], which are overwritten, times what is stored for each of their blocks."""
    return codes.mul_(_spread(scale.float(), scheme, codes.shape))


def _spread(values: torch.Tensor, scheme: Scheme, shape: torch.Size) -> torch.Tensor:
    """Return one value for each block as one for each weight, [N, K] or what broadcasts to it."""
    n, k = shape
    rows, columns = scheme.block
    values = values.reshape(scheme.scales(n, k))
    if columns is not None:
        values = values.repeat_interleave(columns, 1)[:, :k]
    if rows is not None and rows > 1:
        values = values.repeat_interleave(rows, 0)[:n]
    return values
