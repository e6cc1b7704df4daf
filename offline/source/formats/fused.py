"""gpt-oss's MXFP4: the matrices of all experts of a layer in one tensor of codes and one of scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from vllm_milo.dtypes import DTYPES
from vllm_milo.shards import TensorEntry

from ...errors import ConversionError
from ..layers import BROKEN
from .encoding import Encoded, Encoding, Place
from .scheme import Scheme

BLOCK_BYTES = 16
"""Of 32 codes of four bits, which share a scale."""


class FusedEncoding(NamedTuple):
    """How the matrices of all experts are stored: codes uint8 [E, N, K/32, 16] and exponents uint8 [E, N, K/32].

    Attributes:
        scheme: what makes values of them.
        shape: of the values, [E, K, N], as the same model has them in 16 bits.
        dtype: that the values get, by torch's name.
        places: of the two tensors, by the format's names.
    """

    scheme: Scheme
    shape: tuple[int, int, int]
    dtype: str
    places: Mapping[str, Place]

    def matrix(self, expert: int, rows: slice = slice(None)) -> Encoding:
        """Return how some rows of an expert's matrix [N, K] are stored."""
        _, k, n = self.shape
        places = {leaf: place._replace(expert=expert, rows=rows) for leaf, place in self.places.items()}
        return Encoding(self.scheme, (len(range(n)[rows]), k), self.dtype, places)

    def read(self, load: Callable[[Place], torch.Tensor]) -> EncodedExperts:
        """Return all matrices as they are stored, on the CPU; see :meth:`.encoding.Encoding.read`."""
        return EncodedExperts([self.matrix(expert).read(load) for expert in range(self.shape[0])])


class EncodedExperts(NamedTuple):
    """The matrices of all experts as they are stored."""

    experts: list[Encoded]

    def dequantize(self, device: torch.device) -> torch.Tensor:
        """Return the values [E, K, N] in the model's dtype, worked out on ``device``."""
        return torch.stack([expert.dequantize(device).mT for expert in self.experts])


def fused_modules(
    stored: Mapping[str, TensorEntry], scheme: Scheme, dtype: str
) -> Iterator[tuple[str, TensorEntry, FusedEncoding]]:
    """Yield the name, header and encoding of each tensor that holds matrices of all experts.

    Args:
        stored: a model's tensors, as headers have them.
        scheme: how its experts are stored.
        dtype: of the model, by safetensors' name.

    Raises:
        ConversionError: codes or scales are missing, or have another shape or dtype; names the file and the tensor.
    """
    ends = {leaf: f"_{leaf}" for leaf in (scheme.format.codes, scheme.format.scale)}
    found = {name[: -len(end)]: None for name in stored for end in ends.values() if name.endswith(end)}
    for name in found:
        entries = {leaf: stored.get(f"{name}{end}") for leaf, end in ends.items()}
        missing = next((leaf for leaf, entry in entries.items() if entry is None), None)
        if missing is not None:
            raise ConversionError(f"{name}{ends[missing]}: missing; are the model's files complete?")
        codes, scale = (entry for entry in entries.values() if entry is not None)
        for leaf, entry, shape in (
            (scheme.format.codes, codes, (*codes.shape[:3], BLOCK_BYTES)),
            (scheme.format.scale, scale, codes.shape[:3]),
        ):
            if entry.dtype != "U8" or entry.shape != shape or len(codes.shape) != 4 or 0 in shape:
                raise ConversionError(
                    f"{entry.file}: tensor {name}{ends[leaf]} is {entry.dtype} {list(entry.shape)}, but {scheme.name} "
                    f"has U8 codes [experts, N, K/32, 16] and U8 exponents [experts, N, K/32]; {BROKEN}"
                )
        experts, n, blocks, _ = codes.shape
        shape = (experts, 32 * blocks, n)
        places = {leaf: Place(entries[leaf].file, f"{name}{end}") for leaf, end in ends.items()}  # type: ignore[union-attr]
        yield (
            name,
            TensorEntry(codes.file, dtype, shape),
            FusedEncoding(scheme, shape, DTYPES[dtype].torch_name, places),
        )
