"""The tensors that a source's output head becomes, where it is stored as integers."""

from __future__ import annotations

import torch

from vllm_milo.head.layout import HEAD_SCALE, HEAD_WORDS, head_groups
from vllm_milo.kernels.integers import pack_integers

from ..solve.output_head import quantize_head


def head_on_host(module: str, weight: torch.Tensor, bits: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a head's tensors by their names in the checkpoint, on the CPU.

    Args:
        module: the head's name.
        weight: [V, H], any floating dtype, where it lies.
        bits: 8 or 4.
        device: where the arithmetic runs, some rows at a time.

    Raises:
        ConversionError: a scale does not fit fp16.
    """
    groups = head_groups(bits, weight.shape[1])
    parts = [
        (pack_integers(values, bits).cpu(), scale.cpu())
        for values, scale in quantize_head(weight, bits, groups, device)
    ]
    words, scales = (torch.cat(held) for held in zip(*parts, strict=True))
    return {f"{module}.{HEAD_WORDS}": words, f"{module}.{HEAD_SCALE}": scales}
