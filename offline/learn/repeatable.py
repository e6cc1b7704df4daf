"""Lets training on a GPU give the same bytes each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Let what runs inside be differentiated with the same result each time.

    Of a training step's operations, those of fused attention (FlashAttention, memory-efficient, cuDNN's) alone add up
    gradients by atomic additions, whose order changes from run to run. Inside, attention is plain matrix products and a
    softmax: the scores of a step are then held in memory, which windows of 512 tokens allow. PyTorch's switch
    ``use_deterministic_algorithms`` would keep fused attention, but raises in whatever other operation of a model it
    knows no deterministic form of, and wants an environment variable set before CUDA starts. On CPUs nothing changes.

    Args:
        device: where the training runs.
    """
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
