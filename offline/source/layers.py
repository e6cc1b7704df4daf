"""Which matrices the tensors of a source model hold, layer by layer: plain ones, fused 3-D experts, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_milo.dtypes import MODEL_DTYPES
from vllm_milo.shards import TensorEntry

from ..errors import ConversionError
from ..families.family import Family, FusedExperts
from ..nouns import Kind, Matrix

OUTSIDE = "outside the layers"
"""Name of what belongs to no decoder layer."""
WHOLE = "kept as a whole: "
"""Begins the names of what is copied and no decoder layer that the text model runs."""
BROKEN = "the source model is broken"
"""What errors say where a source's tensors contradict each other or hold no numbers."""


class Source(NamedTuple):
    """Where a matrix [N, K] comes from: a tensor, and for fused experts the slice of it, which may be [K, N] there."""

    matrix: Matrix
    tensor: str
    expert: int | None = None
    rows: slice = slice(None)
    transposed: bool = False


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
    return None if name == OUTSIDE or name.startswith(WHOLE) else int(name.rpartition(".")[2])


def plan_layers(tensors: Mapping[str, TensorEntry], family: Family, config: Mapping[str, Any]) -> list[Layer]:
    """Return the layers of a model in order, by the names and shapes of its tensors.

    Args:
        tensors: all of the model, by name.
        family: of the model.
        config: the text model's settings.

    Raises:
        ConversionError: a tensor that a matrix should come from has another shape or dtype.
    """
    layers: dict[str, Layer] = {}
    number, hidden = family.num_layers(config), family.experts_width(config)
    for tensor, entry in sorted(tensors.items(), key=lambda item: natural_key(item[0])):
        name = family.layer_of(tensor) or OUTSIDE
        whole = family.whole_pattern(tensor, number)
        if whole is not None:
            name = WHOLE + whole.removeprefix("re:")
        layer = layers.setdefault(name, Layer(name, [], []))
        sources = [] if whole is not None else _sources(tensor, entry, family, hidden)
        layer.matrices.extend(sources)
        if not sources:
            layer.others.append(tensor)
    return list(layers.values())


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return what sorts the names of tensors with their numbers as numbers: layer 2 before layer 10."""
    return [
        (int(part), "") if part.isdecimal() and part.isascii() and len(part) < 10 else (-1, part)
        for part in name.split(".")
    ]


def _sources(tensor: str, entry: TensorEntry, family: Family, hidden: int | None) -> list[Source]:
    """Return the matrices to quantize that a tensor holds; none for a tensor that is copied."""
    fused = family.fused_experts(tensor)
    if fused is not None:
        return _fused_sources(tensor, entry, fused, hidden)
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


def _fused_sources(tensor: str, entry: TensorEntry, fused: FusedExperts, hidden: int | None) -> list[Source]:
    experts, projections = fused.experts, fused.projections
    transposed = fused.lies_transposed(entry.shape, hidden)
    number, stacked, k = [0, 0, 0] if len(entry.shape) != 3 else entry.shape
    if transposed:
        stacked, k = k, stacked
    if len(entry.shape) != 3 or stacked % len(projections):
        raise ConversionError(
            f"{entry.file}: fused experts {tensor} must have shape [experts, {len(projections)}·N, K], "
            f"found {list(entry.shape)}"
        )
    if fused.transposed and not fused.in_memory and stacked == k:
        raise ConversionError(
            f"{entry.file}: fused experts {tensor} of shape {list(entry.shape)} may be [experts, N, K] or "
            f"[experts, K, N]: this family has both, and these sizes do not tell which; save the model with each "
            f"expert by itself first"
        )
    _check_weights(tensor, entry)
    n = stacked // len(projections)
    return [
        Source(
            Matrix(f"{experts}.{index}.{projection}", Kind.ROUTED_EXPERT, n, k, experts, index),
            tensor,
            index,
            fused.rows(part, n),
            transposed,
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
