"""How much memory a calibration needs, and how much there is."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from ..errors import ConversionError
from ..nouns import Kind
from ..source.layers import Layer
from ..source.reader import ModelReader
from .moment_source import moment_numbers

BYTES = 4
"""Of a float32."""
SLACK = 1.2
"""What activations and the allocator take beside weights and moments."""
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


def whole_model_need(reader: ModelReader) -> int:
    """Return the bytes that a model in float32 takes with the moments of all inputs and gradients."""
    weights = sum(_weights(reader, layer) for layer in reader.layers)
    moments = sum(_input_moments(reader, layer) + _output_moments(layer) for layer in reader.layers)
    return int(SLACK * BYTES * (weights + moments))


def layer_need(reader: ModelReader, tokens: int) -> int:
    """Return the bytes of the largest layer in float32 with its moments, and of the hidden states of all tokens."""
    largest = max(_weights(reader, layer) + _input_moments(reader, layer) for layer in reader.layers if layer.matrices)
    return int(SLACK * BYTES * (largest + tokens * int(reader.config["hidden_size"])))


def moments_need(reader: ModelReader) -> int:
    """Return the bytes of the input moments of all layers, which gather on the host."""
    return int(BYTES * sum(_input_moments(reader, layer) for layer in reader.layers))


def refuse_what_does_not_fit(reader: ModelReader, tokens: int, device: str) -> None:
    """Raise where not even a calibration a layer at a time fits.

    Raises:
        ConversionError: with the need, what there is, and what to do.
    """
    on_device, on_host = layer_need(reader, tokens), moments_need(reader)
    if torch.device(device).type == "cpu":
        _refuse(on_device + on_host, "cpu", "with the moments of all layers")
        return
    _refuse(on_device, device, "for one layer at a time")
    _refuse(on_host, "cpu", "for the moments of all layers")


def refuse_to_write_what_does_not_fit(reader: ModelReader, device: str) -> None:
    """Raise where a model in bf16 does not fit, which writing a text takes.

    Raises:
        ConversionError: with the need, what there is, and what to do.
    """
    need = int(SLACK * 2 * sum(_weights(reader, layer) for layer in reader.layers))
    have = available(device)
    if need > have:
        raise ConversionError(
            f"--calibration self: the model writes its text as a whole, which takes {gib(need)} on {device}, and "
            f"{gib(have)} are free; pass a text, which goes through a layer at a time"
        )


def gib(size: int) -> str:
    """Return a size as text."""
    return f"{size / 2**30:.2f} GiB"


def _refuse(need: int, device: str, what: str) -> None:
    have = available(device)
    if need > have:
        place = "of host memory" if torch.device(device).type == "cpu" else f"on {device}"
        raise ConversionError(
            f"--calibration needs {gib(need)} {place} {what}, and {gib(have)} are free; free some, use fewer "
            f"--calibration-windows if the need is near, or quantize without --calibration (data-free)"
        )


def _weights(reader: ModelReader, layer: Layer) -> int:
    tensors = {source.tensor for source in layer.matrices} | set(layer.others)
    return sum(math.prod(reader.tensors[tensor].shape) for tensor in tensors)


def _input_moments(reader: ModelReader, layer: Layer) -> int:
    """Return the numbers in a layer's input moments; an expert's gate and up projection share theirs."""
    matrices = [source.matrix for source in layer.matrices]
    shared = f".{reader.family.projections.up}"
    return sum(moment_numbers(m.k) for m in matrices if m.kind is not Kind.ROUTED_EXPERT or not m.name.endswith(shared))


def _output_moments(layer: Layer) -> int:
    return sum(moment_numbers(source.matrix.n) for source in layer.matrices)
