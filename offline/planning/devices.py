"""The devices that a user names."""

from __future__ import annotations

from collections.abc import Sequence

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


def find_devices(names: Sequence[str]) -> list[torch.device]:
    """Return devices by their names, the first of which stands for all where a kind counts.

    Raises:
        ConversionError: one does not exist, they are not of one kind, or a GPU is named twice.
    """
    devices = [find_device(name) for name in names]
    said = f"--devices {','.join(names)}"
    if len({device.type for device in devices}) > 1:
        raise ConversionError(f"{said}: GPUs and CPUs add up in another order; name devices of one kind")
    indices = [device.index or 0 for device in devices if device.type == "cuda"]
    if len(set(indices)) < len(indices):
        raise ConversionError(f"{said}: names a GPU twice; name each once, as in cuda:0,cuda:1")
    if indices and len(indices) > 1:  # so that the first is told from the others
        return [torch.device("cuda", index) for index in indices]
    return devices


def _number_seen() -> str:
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"{number} CUDA devices" if number else "no CUDA device"
