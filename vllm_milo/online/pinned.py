"""Pinned memory for weights on their way to a GPU, from which it copies several times as fast; given back after a load.

PyTorch keeps pinned memory that is free for the next use, a server for as long as it runs. Versions of PyTorch give it
back by functions of different names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def pins(device: torch.device) -> bool:
    """Return whether weights for a device go through pinned memory: to GPUs, where it can be given back."""
    return device.type == "cuda" and _releaser() is not None


def release() -> None:
    """Give free pinned memory back to the system, where any was used."""
    releaser = _releaser()
    if releaser is not None and torch.cuda.is_initialized():
        releaser()


def _releaser() -> Callable[[], None] | None:
    """Return PyTorch's function, or None where there is none."""
    public: Callable[[], None] | None = getattr(torch.accelerator, "empty_host_cache", None)
    own: Callable[[], None] | None = getattr(torch._C, "_host_emptyCache", None)
    return public or own
