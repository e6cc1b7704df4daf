"""Which matrices the tensors of a source model hold, layer by layer: plain ones, fused 3-D experts, and the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from vllm_milo.dtypes import MODEL_DTYPES
from vllm_milo.shards import TensorEntry

from ..errors import ConversionError
from ..families.family import Family
from ..nouns import Kind, Matrix

OUTSIDE = "outside the layers"
"""Name of what belongs to no decoder layer."""
AHEAD = "predicts further tokens: "
"""Begins the names of what predicts further tokens, which is copied and no decoder layer that the model runs."""
BROKEN = "the source model is broken"
"""What errors say where a source's tensors contradict each other or hold no numbers."""


class Source(NamedTuple):
    """Where a matrix [N, K] comes from: a tensor, and for fused experts the slice of it."""

    matrix: Matrix
    tensor: str
    expert: int | None = None
    rows: slice = slice(None)


class Layer(NamedTuple):
    """The unit of streaming: the matrices and the other tensors of one decoder layer (or of none)."""

    name: str
    matrices: list[Source]
    others: list[str]

    @property
    def weights(self) -> int:
        """Return the number of weights of the layer's matrices."""
        return sum(source.matrix.n * source.matrix.k for source in self.matrices)


def layer_index(name: str) -> int | None:
    """Return the number of a decoder layer by its name; None for what belongs to none that the model runs."""
    return None if name == OUTSIDE or name.startswith(AHEAD) else int(name.rpartition(".")[2])


def plan_layers(tensors: Mapping[str, TensorEntry], family: Family, number: int | None) -> list[Layer]:
    """Return the layers of a model in order, by the names and shapes of its tensors.

    Args:
        tensors: all of the model, by name.
        family: of the model.
        number: of decoder layers, by config.json; None where it does not say.

    Raises:
        ConversionError: a tensor that a matrix should come from has another shape or dtype.
    """
    layers: dict[str, Layer] = {}
    for tensor, entry in sorted(tensors.items(), key=lambda item: _natural_key(item[0])):
        match = re.match(r"model\.layers\.\d+", tensor)
        name = match[0] if match else OUTSIDE
        ahead = family.ahead_pattern(tensor, number)
        if ahead is not None:
            name = AHEAD + ahead.removeprefix("re:")
        layer = layers.setdefault(name, Layer(name, [], []))
        sources = [] if ahead is not None else _sources(tensor, entry, family)
        layer.matrices.extend(sources)
        if not sources:
            layer.others.append(tensor)
    return list(layers.values())


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() and part.isascii() and len(part) < 10 else (-1, part)
        for part in name.split(".")
    ]


def _sources(tensor: str, entry: TensorEntry, family: Family) -> list[Source]:
    """Return the matrices to quantize that a tensor holds; none for a tensor that is copied."""
    fused = family.fused_experts(tensor)
    if fused is not None:
        return _fused_sources(tensor, entry, fused.experts, fused.projections)
    module, _, leaf = family.checkpoint_name(tensor).rpartition(".")
    kind = family.kind(module) if leaf == "weight" else None
    if kind is None:
        return []
    if len(entry.shape) != 2:
        raise ConversionError(f"{entry.file}: tensor {tensor} must have 2 dimensions, found {list(entry.shape)}")
    _check_weights(tensor, entry)
    experts, index = None, None
    if ".experts." in module:
        experts, number, _ = module.rsplit(".", 2)
        index = int(number)
    return [Source(Matrix(module, kind, *entry.shape, experts, index), tensor)]


def _fused_sources(tensor: str, entry: TensorEntry, experts: str, projections: tuple[str, ...]) -> list[Source]:
    if len(entry.shape) != 3 or entry.shape[1] % len(projections):
        raise ConversionError(
            f"{entry.file}: fused experts {tensor} must have shape [experts, {len(projections)}·N, K], "
            f"found {list(entry.shape)}"
        )
    _check_weights(tensor, entry)
    number, stacked, k = entry.shape
    n = stacked // len(projections)
    return [
        Source(
            Matrix(f"{experts}.{index}.{projection}", Kind.ROUTED_EXPERT, n, k, experts, index),
            tensor,
            index,
            slice(part * n, (part + 1) * n),
        )
        for index in range(number)
        for part, projection in enumerate(projections)
    ]


def _check_weights(tensor: str, entry: TensorEntry) -> None:
    if 0 in entry.shape:
        raise ConversionError(f"{entry.file}: tensor {tensor} has shape {list(entry.shape)} and no weights; {BROKEN}")
    if entry.dtype not in MODEL_DTYPES:
        raise ConversionError(
            f"{entry.file}: tensor {tensor} is {entry.dtype}; weights must be one of {', '.join(MODEL_DTYPES)}"
        )
