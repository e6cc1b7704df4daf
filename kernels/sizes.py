"""Whole numbers that sizes of launches and layouts are made of.

Triton has both, but counts them as functions that kernels may call too: a call takes two microseconds, and a layer of
experts that no CUDA graph holds makes some twenty.
"""

from __future__ import annotations


def cdiv(number: int, divisor: int) -> int:
    """Return the quotient, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()
