"""The matrices that a conversion could quantize and does not, because ``--ignore`` names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_milo.dtypes import DTYPES

from ..nouns import Matrix
from ..source.ignore import kept_experts
from ..source.layers import Layer
from ..source.reader import ModelReader


class Kept(NamedTuple):
    """What stays as the source has it.

    Attributes:
        matrices: in the order of the layers.
        experts: modules of routed experts, all of whose matrices are among them.
        bytes: of these matrices.
    """

    matrices: list[Matrix]
    experts: list[str]
    bytes: int

    @property
    def weights(self) -> int:
        """Return their number of weights."""
        return sum(matrix.n * matrix.k for matrix in self.matrices)

    def bits_with(self, weights: int, size: int) -> float:
        """Return the stored bits of a weight, over these matrices and ``weights`` quantized ones in ``size`` bytes."""
        return 8 * (self.bytes + size) / (self.weights + weights)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--dry-run --json`` says of them."""
        counts = {"matrices": len(self.matrices), "weights": self.weights, "bytes": self.bytes}
        return counts | {"experts": self.experts}


def find_kept(reader: ModelReader, layers: Sequence[Layer]) -> Kept:
    """Return what the layers of a model keep.

    Args:
        reader: the model, all of whose layers' matrices could be quantized.
        layers: the same layers with the matrices that are.
    """
    quantized = [source.matrix for layer in layers for source in layer.matrices]
    names = {matrix.name for matrix in quantized}
    left = [source for layer in reader.layers for source in layer.matrices if source.matrix.name not in names]
    size = sum(one.matrix.n * one.matrix.k * DTYPES[reader.tensors[one.tensor].dtype].size for one in left)
    return Kept([source.matrix for source in left], kept_experts(reader.matrices, quantized), size)
