"""How precisely a GPU multiplies float32 matrices: TF32 where an error of 1e-3 is far below what quantization does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let a GPU's tensor cores multiply float32 matrices inside the block (TF32, relative errors of 1e-3).

    For products with whole weights, which exact float32 would make the most expensive part of a round.
    """
    with _precision("high", device):
        yield


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply in float32 inside the block: for Gram matrices that are factorized, whose smallest values count."""
    with _precision("highest", device):
        yield


@contextmanager
def _precision(wanted: str, device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
