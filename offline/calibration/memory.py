"""How much memory a calibration needs, and how much there is."""

from __future__ import annotations

import math
import os
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import ConversionError
from ..nouns import EXPERT_PIECES
from ..source.config import stated
from ..source.layers import Layer
from ..source.reader import ModelReader
from .generated_text import BATCH, OPENING_LENGTHS
from .step_memory import WINDOW, logit_bytes, number_size, passing_bytes, saved_bytes, shape_of, step_tokens

SLACK = 1.2
"""What activations and the allocator take beside what is counted."""
LATENT_BYTES = 18
"""Of each weight of a layer whose codes are learned: the latent with Adam's two moments, the float32 copy that it
begins from, and the solver's codes and factors; beside the weight and its gradient."""
STREAMS = 3
"""Hidden states that are held of every token: before a layer in both streams, and after it in one of them."""
DEFAULT_STATES = 6 * 2**30
"""Bytes of hidden states that a calibration takes where nobody says how many windows it may have."""
PLAIN_BYTES = 10 * 4
"""Of each weight of a batch in the solver: ten float32 copies."""
WRITTEN_BYTES = 2
"""Of each weight of the largest layer on its way to the disk, about half a byte each: one layer is gathered, one waits,
and one is written, twice where safetensors copies it."""
HOST_BASE = {"cpu": 2**30 * 3 // 8, "cuda": 3 * 2**30}
"""Host memory of Python and its libraries; with CUDA's it is much more."""
SOLVED_BYTES = 2
"""Of each weight of a layer on the host, where its experts are trained in rounds: codes, and factors in bytes."""
_MEMORY_INFO = Path("/proc/meminfo")


class States(StrEnum):
    """Where the hidden states of a text lie."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Layout(NamedTuple):
    """How a conversion along a text is laid out in memory.

    Attributes:
        states: where the hidden states lie.
        rounds: parts of a layer's experts that are trained one after the other.
        devices: that hold what is trained of experts, a part each.
    """

    states: States = States.DEVICE
    rounds: int = 1
    devices: int = 1

    def line(self) -> str | None:
        """Return what is unusual about it, as text; None for nothing."""
        said = {
            States.HOST: "hidden states on the host",
            States.DISK: "hidden states on the output's disk",
        }
        parts = [said[self.states]] if self.states in said else []
        parts += [f"experts trained in {self.rounds} rounds, one after the other"] if self.rounds > 1 else []
        parts += [f"what is trained of them on {self.devices} devices"] if self.devices > 1 else []
        return f"memory is short: {', '.join(parts)}" if parts else None


SIMPLE = Layout()


def available(device: str) -> int:
    """Return the bytes free on a device, or on the host for ``cpu``."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if _MEMORY_INFO.exists():
        for line in _MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def room(device: str, limit: int | None) -> int:
    """Return the bytes that a conversion has on a device: what is free, but no more than ``limit``."""
    return available(device) if limit is None else min(available(device), limit)


def streamed_need(reader: ModelReader, tokens: int, device: str, layout: Layout = SIMPLE) -> int:
    """Return the bytes that converting with a calibration text of so many tokens takes on a device, the first."""
    layers = [layer for layer in reader.layers if layer.matrices]
    elsewhere = (1 - _expert_share(reader, layout)) * LATENT_BYTES
    held = max(
        _weights(reader, layer) * (LATENT_BYTES + 2 * number_size(device)) - elsewhere * _expert_weights(layer)
        for layer in layers
    )
    return int(SLACK * (held + _step_need(reader, device))) + states_need(reader, tokens, device, layout)


def further_need(reader: ModelReader, device: str, layout: Layout) -> int:
    """Return the bytes that a further device holds of what is trained, with gradients and weights on their way."""
    largest = max(_expert_weights(layer) for layer in reader.layers)
    return int(SLACK * _expert_share(reader, layout) * largest * (LATENT_BYTES + 2 * number_size(device)))


def states_need(reader: ModelReader, tokens: int, device: str, layout: Layout = SIMPLE) -> int:
    """Return the bytes of hidden states on a device: those of so many tokens, or of one step where they lie elsewhere.

    They are in the device's dtype wherever they lie.
    """
    if layout.states != States.DEVICE:
        tokens = min(tokens, step_tokens(device))
    return int(SLACK * tokens * _token_need(reader, device))


def solving_need(reader: ModelReader, tokens: int, batch: int, device: str, layout: Layout = SIMPLE) -> int:
    """Return the bytes that the solver takes beside such a text, where it gets ``batch`` weights at once."""
    largest = _largest(reader)
    solved = largest * number_size(device) + PLAIN_BYTES * min(batch, largest)
    return int(SLACK * solved) + states_need(reader, tokens, device, layout)


def windows_that_fit(reader: ModelReader, length: int, have: int, device: str, layout: Layout = SIMPLE) -> int:
    """Return how many calibration windows of so many tokens fit into ``have`` bytes of a device; 0 for none."""
    left = have - streamed_need(reader, 0, device, layout)
    return max(0, int(left / (SLACK * length * _token_need(reader, device))))


def plain_need(reader: ModelReader, batch: int) -> int:
    """Return the bytes that converting without a text takes, where the solver gets ``batch`` weights at once."""
    largest = max(source.matrix.n * source.matrix.k for layer in reader.layers for source in layer.matrices)
    return solver_need(max(largest, min(batch, _largest(reader))))


def solver_need(weights: int) -> int:
    """Return the bytes that the solver takes for so many weights at once."""
    return int(SLACK * PLAIN_BYTES * weights)


def windows_within(size: int, reader: ModelReader, length: int, device: str) -> int:
    """Return how many windows of ``length`` tokens have hidden states of together ``size`` bytes, at least one."""
    return max(1, size // (length * _token_need(reader, device)))


def writing_need(reader: ModelReader, device: str) -> int:
    """Return the bytes that a whole model takes that writes a text, with keys and values of all windows at once."""
    config, size = reader.config, number_size(device)
    heads = stated(config, "num_attention_heads", reader.folder)
    shapes = [shape_of(reader, layer) for layer in reader.layers if layer.matrices]
    kept = int(config.get("num_key_value_heads") or heads) / heads
    keys = sum(2 * size * WINDOW * kept * shape.attention for shape in shapes)
    first = max(size * (8 * s.hidden + 2 * s.chosen * s.hidden + 3 * s.inner) for s in shapes) * max(OPENING_LENGTHS)
    words = (size + 5 * 4) * stated(config, "vocab_size", reader.folder)
    return int(SLACK * (size * _all(reader) + BATCH * (keys + first + words)))


def tuning_need(reader: ModelReader, device: str) -> int:
    """Return the bytes that training a whole model against the original takes."""
    size, tokens = reader.dtype.itemsize, step_tokens(device)
    shapes = [shape_of(reader, layer) for layer in reader.layers if layer.matrices]
    logits = logit_bytes(device, size) * stated(reader.config, "vocab_size", reader.folder)
    # logits are gone when the backward pass comes to the layers
    step = max(logits, *(passing_bytes(shape, device, size) for shape in shapes))
    step += sum(saved_bytes(shape, device, size) for shape in shapes)
    quantized = sum(layer.weights for layer in reader.layers)
    weights = 2 * size * _all(reader) + (LATENT_BYTES + size) * quantized
    return int(SLACK * (weights + tokens * step))


class Need(NamedTuple):
    """The most bytes that a conversion takes; on the device none where that is the CPU, whose memory is the host's."""

    device: int
    host: int

    def line(self, device: str) -> str:
        """Return this beside what is free, as text."""
        host = f"{gib(self.host)} of host memory ({gib(available('cpu'))} free)"
        if not self.device:
            return f"memory: up to about {host}"
        return f"memory: up to about {gib(self.device)} on {device} ({gib(available(device))} free) and {host}"


def whole_need(
    reader: ModelReader, working: int, device: str, shard_bytes: int, tokens: int = 0, layout: Layout = SIMPLE
) -> Need:
    """Return what a conversion takes in all.

    Args:
        reader: the source model.
        working: bytes that its arithmetic takes on the device.
        device: where that is.
        shard_bytes: most bytes of a shard of the output, which is held until it is full.
        tokens: of a calibration text.
        layout: where its hidden states lie, and in how many rounds layers are trained.
    """
    kind = torch.device(device).type
    read = 2 * _largest(reader)  # pages of the source's files
    written = WRITTEN_BYTES * _largest(reader) + min(shard_bytes, 2 * _all(reader))
    host = HOST_BASE.get(kind, HOST_BASE["cpu"]) + read + written
    host += SOLVED_BYTES * _largest(reader) if layout.rounds > 1 else 0
    host += states_need(reader, tokens, device) if layout.states == States.HOST else 0
    return Need(working, host) if kind == "cuda" else Need(0, host + working)


def process_need(reader: ModelReader, batch: int, device: str) -> int:
    """Return the bytes of host memory that the process of a further device takes.

    Args:
        reader: the source model.
        batch: most weights that the solver gets at once, of which one set is solved and one read.
        device: of the process.
    """
    if torch.device(device).type == "cuda":
        return HOST_BASE["cuda"] + 2 * 2 * min(batch, _largest(reader))
    return HOST_BASE["cpu"] + plain_need(reader, batch)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def advice(reader: ModelReader, windows: torch.Tensor, device: str) -> str:
    """Return what to do after memory ran out with these windows [W, T], which the estimate let pass."""
    have = available(device)
    if torch.device(device).type == "cuda":
        have += torch.cuda.memory_reserved(torch.device(device))  # what this process holds
    fit = windows_that_fit(reader, windows.shape[1], have, device)
    return what_fits(min(fit, len(windows) // 2))


def what_fits(windows: int) -> str:
    """Return what to do where memory does not suffice and so many windows would fit, as text."""
    none = "--calibration none needs least and is less accurate"
    if windows:
        return f"use --calibration-windows {windows}, which should fit; {none}"
    return f"use a device with more memory: not one window fits beside the largest layer; {none}"


def refuse_to_write_what_does_not_fit(reader: ModelReader, device: str) -> None:
    """Raise where a whole model does not fit, which writing a text takes.

    Raises:
        ConversionError: with the need, what there is, and what to do.
    """
    need, have = writing_need(reader, device), available(device)
    if need > have:
        raise ConversionError(
            f"--calibration self: the model writes its text as a whole, which takes {gib(need)} on {device}, and "
            f"{gib(have)} are free; use the text that comes with the package, which goes through a layer at a time"
        )


def gib(size: int) -> str:
    """Return a size as text."""
    return f"{size / 2**30:.2f} GiB"


def _token_need(reader: ModelReader, device: str) -> int:
    """Return the bytes of each token's hidden states."""
    return STREAMS * stated(reader.config, "hidden_size", reader.folder) * number_size(device)


def _step_need(reader: ModelReader, device: str) -> int:
    """Return the bytes that a training step of one layer takes beside its weights."""
    size = number_size(device)
    shapes = [shape_of(reader, layer) for layer in reader.layers if layer.matrices]
    return step_tokens(device) * max(
        saved_bytes(shape, device, size) + passing_bytes(shape, device, size) for shape in shapes
    )


def _largest(reader: ModelReader) -> int:
    return max(_weights(reader, layer) for layer in reader.layers if layer.matrices)


def most_experts(reader: ModelReader) -> int:
    """Return the most routed experts of a layer, at least 1."""
    held = ({source.matrix.expert for source in layer.matrices} - {None} for layer in reader.layers)
    return max(map(len, held)) or 1


def _expert_share(reader: ModelReader, layout: Layout) -> float:
    """Return the share of a layer's routed experts that the first device trains at once."""
    experts = most_experts(reader)
    return -(-experts // layout.rounds) / experts * (-(-EXPERT_PIECES // layout.devices) / EXPERT_PIECES)


def _expert_weights(layer: Layer) -> int:
    return sum(source.matrix.n * source.matrix.k for source in layer.matrices if source.matrix.experts is not None)


def _all(reader: ModelReader) -> int:
    return sum(_weights(reader, layer) for layer in reader.layers)


def _weights(reader: ModelReader, layer: Layer) -> int:
    tensors = {source.tensor for source in layer.matrices} | set(layer.others)
    return sum(math.prod(reader.tensors[tensor].shape) for tensor in tensors)
