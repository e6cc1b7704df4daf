"""Whether tensors hold numbers alone: fast enough to look at all of a model's weights before hours are spent."""

from __future__ import annotations

import torch


def is_finite(values: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor Inf.

    The least and the largest value tell, without a copy of the tensor: they are NaN if any value is.
    """
    if not values.is_floating_point() or values.numel() == 0:
        return True
    if values.dtype.itemsize == 1:  # of these formats not all know their least value
        values = values.float()
    return bool(torch.stack(values.aminmax()).isfinite().all())
