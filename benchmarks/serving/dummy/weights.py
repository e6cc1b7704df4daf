"""Packed dummy weights are filled like others."""

from __future__ import annotations

from typing import Any

import torch

SMALLEST_WEIGHT = 2**16
"""Integer tensors with fewer elements are no weights but locks and the like."""


def fill_integers() -> None:
    """Make vLLM's dummy loader fill packed weights too.

    It fills floating-point parameters only and leaves the codes as the allocator returns them, most often zeros: a
    GPU multiplying zeros draws less power and clocks higher than one at work.
    """
    from vllm.model_executor.model_loader import weight_utils

    original = weight_utils.initialize_single_dummy_weight

    def initialize(param: torch.Tensor, *arguments: Any, **options: Any) -> None:
        integers = (torch.int32, torch.uint8, torch.int8)
        if param.dtype in integers and param.numel() >= SMALLEST_WEIGHT and param.device.type != "meta":
            param.data.view(torch.uint8).random_(0, 256)
        else:
            original(param, *arguments, **options)

    weight_utils.initialize_single_dummy_weight = initialize
