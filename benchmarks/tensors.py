"""What the tensors of a loaded model take."""

from __future__ import annotations

import torch


def tensor_sizes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return bytes and number of elements of a model's tensors by name, those that share memory once."""
    sizes: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.numel() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            sizes[name] = (tensor.nbytes, tensor.numel())
    return sizes
