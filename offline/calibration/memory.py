"""How much memory a calibration needs, and how much there is."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from ..errors import ConversionError
from ..source.layers import Layer
from ..source.reader import ModelReader

SLACK = 1.2
"""What activations and the allocator take beside what is counted."""
LATENT_BYTES = 22
"""Of each weight of a layer whose codes are learned: the weight and its gradient in 16 bits, the latent with Adam's two
moments and the float32 copy that it begins from."""
STREAMS = 3
"""Hidden states that are held of every token: before a layer in both streams, and after it in the original one."""
DEFAULT_STATES = 6 * 2**30
"""Bytes of hidden states that a calibration takes where nobody says how many windows it may have."""
_MEMORY_INFO = Path("/proc/meminfo")


def available(device: str) -> int:
    """Return the bytes free on a device, or on the host for ``cpu``."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if _MEMORY_INFO.exists():
        for line in _MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def streamed_need(reader: ModelReader, tokens: int, device: str) -> int:
    """Return the bytes that converting with a calibration text of so many tokens takes on a device."""
    size = 2 if torch.device(device).type == "cuda" else 4
    largest = max(_weights(reader, layer) for layer in reader.layers if layer.matrices)
    states = STREAMS * tokens * int(reader.config["hidden_size"]) * size
    return int(SLACK * (largest * LATENT_BYTES + states))


def windows_within(size: int, reader: ModelReader, length: int, device: str) -> int:
    """Return how many windows of ``length`` tokens have hidden states of together ``size`` bytes, at least one."""
    width = 2 if torch.device(device).type == "cuda" else 4
    return max(1, size // (STREAMS * length * int(reader.config["hidden_size"]) * width))


def whole_model_need(reader: ModelReader) -> int:
    """Return the bytes that a model takes in 16 bits."""
    return int(SLACK * 2 * sum(_weights(reader, layer) for layer in reader.layers))


def tuning_need(reader: ModelReader) -> int:
    """Return the bytes that training a whole model against the original takes."""
    return int(SLACK * (2 + LATENT_BYTES) * sum(_weights(reader, layer) for layer in reader.layers))


def refuse_what_does_not_fit(reader: ModelReader, tokens: int, device: str) -> None:
    """Raise where a calibrated conversion does not fit.

    Raises:
        ConversionError: with the need, what there is, and what to do.
    """
    need, have = streamed_need(reader, tokens, device), available(device)
    if need > have:
        raise ConversionError(
            f"converting with a calibration text takes {gib(need)} on {device}, and {gib(have)} are free; free some, "
            f"use fewer --calibration-windows, or --calibration none, which needs least and is less accurate"
        )


def refuse_to_write_what_does_not_fit(reader: ModelReader, device: str) -> None:
    """Raise where a whole model does not fit, which writing a text takes.

    Raises:
        ConversionError: with the need, what there is, and what to do.
    """
    need, have = whole_model_need(reader), available(device)
    if need > have:
        raise ConversionError(
            f"--calibration self: the model writes its text as a whole, which takes {gib(need)} on {device}, and "
            f"{gib(have)} are free; use the text that comes with the package, which goes through a layer at a time"
        )


def gib(size: int) -> str:
    """Return a size as text."""
    return f"{size / 2**30:.2f} GiB"


def _weights(reader: ModelReader, layer: Layer) -> int:
    tensors = {source.tensor for source in layer.matrices} | set(layer.others)
    return sum(math.prod(reader.tensors[tensor].shape) for tensor in tensors)
