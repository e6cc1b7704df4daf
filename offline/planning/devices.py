"""The device that a user names."""

from __future__ import annotations

import torch

from ..errors import ConversionError


def find_device(name: str) -> torch.device:
    """Return a device by its name.

    Raises:
        ConversionError: there is none of this name, or the converter has no use for it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConversionError(f"--device {name}: torch knows no such device; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConversionError(f"--device {name}: nothing of milo runs on it; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConversionError(f"--device {name}: torch sees {_number_seen()}; use --device cpu")
    return device


def _number_seen() -> str:
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"{number} CUDA devices" if number else "no CUDA device"
