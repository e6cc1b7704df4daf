"""A checkpoint's tensors beside those of the model that it was made of, a tensor of each in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_milo.checkpoint import MiLoFormat

from ..checkpoint.dequantize import DequantizedTensors
from ..progress import progress_bar
from ..source.layers import Layer
from ..source.reader import ModelReader
from .divergence import refuse_strangers

WORST_ERROR = 1.0
"""Relative error that no good checkpoint reaches: weights that are all zero have it, those of another model more."""


@dataclass
class Likeness:
    """How a checkpoint's tensors differ from the source's.

    Attributes:
        errors: |W - W'| / |W|, Frobenius, of each quantized matrix.
        head: the same of an output head that is stored as integers; None without one.
        copied: number of the tensors that are the source's bit for bit.
        problems: what no good checkpoint shows, each with the name of its matrix or tensor.
    """

    errors: dict[str, float] = field(default_factory=dict)
    head: float | None = None
    copied: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Return the mean error of the quantized matrices."""
        return sum(self.errors.values()) / len(self.errors) if self.errors else math.nan

    def largest(self, number: int) -> dict[str, float]:
        """Return the matrices with the largest errors, those that are not finite first."""

        def size(name: str) -> float:
            return self.errors[name] if math.isfinite(self.errors[name]) else math.inf

        return {name: self.errors[name] for name in sorted(self.errors, key=size, reverse=True)[:number]}


def compare_with_source(folder: Path, fmt: MiLoFormat, reference: Path, progress: bool = False) -> Likeness:
    """Compare every tensor of a checkpoint with the model that it was made of.

    Args:
        folder: of the checkpoint, which keeps to its format.
        fmt: its format.
        reference: folder of the source model.
        progress: show how far it is on stderr.

    Raises:
        ConversionError: the reference is no such model, or is broken.
        ShardError: files of the checkpoint cannot be read.
    """
    tensors = DequantizedTensors(folder, fmt, torch.float32)
    refuse_strangers(folder, reference)
    reader, found = ModelReader(reference), Likeness()
    missing = tensors.matrices | tensors.others | {f"{module}.weight" for module in tensors.heads}
    for layer in progress_bar(reader.layers, "compare", progress):
        missing -= _compare_matrices(reader, layer, tensors, found)
        missing -= _compare_copies(reader, layer, tensors, found)
    found.problems += [f"{name}: the reference {reference} has no such tensor" for name in sorted(missing)]
    return found


def _compare_matrices(reader: ModelReader, layer: Layer, tensors: DequantizedTensors, found: Likeness) -> set[str]:
    """Note the errors of a layer's quantized matrices; return their names."""
    held = tensors.matrices
    quantized = layer._replace(matrices=[source for source in layer.matrices if source.matrix.name in held])
    for matrix, weight in reader.load_layer(quantized, torch.device("cpu")):
        error = _error_of(matrix.name, tensors.weight(matrix.name), weight, found)
        if error is not None:
            found.errors[matrix.name] = error
    return {source.matrix.name for source in quantized.matrices}


def _error_of(name: str, values: torch.Tensor, weight: torch.Tensor, found: Likeness) -> float | None:
    """Return the error of a matrix, and note what is wrong with it; None where its shape is."""
    if values.shape != weight.shape:
        found.problems.append(f"{name}: has shape {list(values.shape)}, but {list(weight.shape)} in the reference")
        return None
    error = relative_error(values, weight)
    if not error < WORST_ERROR:
        found.problems.append(f"{name}: relative error {error:.4g}; no good checkpoint reaches {WORST_ERROR:g}")
    return error


def _compare_copies(reader: ModelReader, layer: Layer, tensors: DequantizedTensors, found: Likeness) -> set[str]:
    """Compare what of a layer is not quantized; return its names in the checkpoint."""
    held, seen = tensors.others, set()
    for tensor in _copied(layer, tensors.matrices):
        name = reader.family.checkpoint_name(tensor)
        seen.add(name)
        module = name.removesuffix(".weight")
        if module != name and module in tensors.heads:
            found.head = _error_of(module, tensors.head(module), reader.load(tensor).float(), found)
        elif name not in held:
            found.problems.append(f"{name}: missing, but the reference has it")
        elif not same_bits(tensors.stored(name), reader.load(tensor)):
            found.problems.append(f"{name}: is not the reference's bit for bit")
        else:
            found.copied += 1
    return seen


def _copied(layer: Layer, quantized: set[str]) -> Iterator[str]:
    """Yield once the source tensors of a layer that hold anything which is not quantized."""
    left = [source.tensor for source in layer.matrices if source.matrix.name not in quantized]
    yield from dict.fromkeys([*layer.others, *left])


def relative_error(values: torch.Tensor, weight: torch.Tensor) -> float:
    """Return |W - W'| / |W|, Frobenius; of a W of zeros 0 if W' is the same, else infinity."""
    difference, norm = float((weight - values).norm()), float(weight.norm())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same to the bit, NaN and the sign of zero included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
