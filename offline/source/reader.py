"""Reads a source model folder: its config, its plan of layers, and its tensors on demand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_milo.dtypes import DTYPES, MODEL_DTYPES, safetensors_name
from vllm_milo.names import find_key
from vllm_milo.shards import TensorEntry, read_tensors

from ..errors import ConversionError
from ..families.family import Family
from ..families.find import find_family
from ..nouns import Matrix
from .completeness import (
    check_complete,
    check_experts,
    check_fused,
    check_names,
    check_routers,
    check_shapes,
    check_stated,
)
from .config import read_config
from .finite import is_finite
from .layers import BROKEN, Layer, Source, plan_layers
from .parts import Opened, Part, read_part

Uses = Mapping[str, Sequence[str]]
"""The names of the shards that hold a layer, by the layer's name, in the order that layers are worked on."""


class Shards(Protocol):
    """A model's files of weights: of a folder (:class:`FolderShards`), or there while they are used and no longer.

    Attributes:
        streamed: whether they are not all there at once, so that nobody may look at all weights in advance.
    """

    streamed: bool

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Return the model's tensors by name, as headers have them."""

    def shard(self, path: Path) -> Any:
        """Return a shard, opened; a thread that asks for one that has to come waits for it."""

    def coming(self, uses: Uses, folder: Path) -> AbstractContextManager[None]:
        """Return a context within which shards that are not there come into ``folder``, for layers that use them."""

    def used(self, layers: Iterable[str]) -> None:
        """Note that some layers need their shards no more."""

    def stopping(self) -> AbstractContextManager[None]:
        """Return a context that, if it ends early, lets nobody wait for a shard any more."""

    def peak_bytes(self, uses: Uses) -> int:
        """Return the most bytes that shards take on the disk which were not there before."""


class FolderShards:
    """The files of a model folder, which are all there."""

    streamed = False

    def __init__(self, folder: Path) -> None:
        self.tensors: Mapping[str, TensorEntry] = read_tensors(folder)
        self.shard = Opened().shard

    def coming(self, uses: Uses, folder: Path) -> AbstractContextManager[None]:
        """Return a context in which nothing happens: all is there."""
        return nullcontext()

    def used(self, layers: Iterable[str]) -> None:
        """Do nothing: the files are the user's."""

    def stopping(self) -> AbstractContextManager[None]:
        """Return a context in which nothing happens: nobody waits."""
        return nullcontext()

    def peak_bytes(self, uses: Uses) -> int:
        """Return 0."""
        return 0


class ModelReader:
    """A source model: its config, what of it will be quantized, and its tensors on demand, in any thread.

    Args:
        folder: of the model.
        shards: its files of weights, where they do not lie there.

    Attributes:
        config: what config.json states of the text model.
        whole_config: all of it.

    Raises:
        ConversionError: no model, an unknown family, or tensors that do not fit the config.
        ShardError: a file is missing, truncated or unreadable.
    """

    def __init__(self, folder: Path, shards: Shards | None = None) -> None:
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder; download the model first")
        self.folder = folder
        self.whole_config: dict[str, Any] = read_config(folder)
        self.family: Family = find_family(self.whole_config)
        self.config: dict[str, Any] = self.family.settings(self.whole_config)
        self.shards: Shards = FolderShards(folder) if shards is None else shards
        self.tensors = self.shards.tensors
        check_names(self.tensors, folder, self.family)
        self.layers = plan_layers(self.tensors, self.family, self.config)
        check_complete(self.layers, self.config, self.family)
        check_shapes(self.layers, self.tensors, self.config, self.family)
        check_fused(self.layers, self.tensors, self.config)
        check_experts(self.matrices, self.family.num_experts(self.config))
        check_routers(self.layers, self.tensors, self.family, self.family.num_choices(self.config))
        check_stated(self.matrices, self.tensors, self.config, self.family)

    @property
    def matrices(self) -> list[Matrix]:
        """Return all matrices that the family quantizes, in the order of the layers."""
        return [source.matrix for layer in self.layers for source in layer.matrices]

    @cached_property
    def ignore(self) -> tuple[str, ...]:
        """Return names and patterns of what the family never quantizes, as the checkpoint's ``ignore`` lists them.

        Beside the family's patterns these are exact names, which vLLM renames along with its modules.
        """
        family, patterns = self.family, self.family.ignore
        names = (family.checkpoint_name(tensor) for layer in self.layers for tensor in layer.others)
        kept = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        exact = [name for name in kept if family.is_kept(name) and find_key(patterns, name) is None]
        number = family.num_layers(self.config)
        whole = dict.fromkeys(family.whole_pattern(tensor, number) for tensor in self.tensors)
        return (*patterns, *exact, *(pattern for pattern in whole if pattern is not None))

    @property
    def dtype(self) -> torch.dtype:
        """Return the model's dtype, by its config or else by its first quantizable tensor."""
        stated = self.config.get("dtype", self.config.get("torch_dtype"))
        if safetensors_name(str(stated)) in MODEL_DTYPES:
            return getattr(torch, str(stated).removeprefix("torch."))
        first = next(source for layer in self.layers for source in layer.matrices)
        return getattr(torch, DTYPES[self.tensors[first.tensor].dtype].torch_name)

    def load(self, tensor: str) -> torch.Tensor:
        """Return a tensor as it is stored, on the CPU."""
        return read_part(Part(self.tensors[tensor].file, tensor), self.shards.shard)

    def part(self, source: Source) -> Part:
        """Return where a matrix lies in the model's files."""
        return Part(self.tensors[source.tensor].file, *source[1:])

    def load_matrix(self, source: Source) -> torch.Tensor:
        """Return a matrix as it is stored, on the CPU; of a tensor that holds several, no more is read."""
        return read_part(self.part(source), self.shards.shard)

    def load_finite(self, tensor: str) -> torch.Tensor:
        """Return a tensor as it is stored, on the CPU.

        Raises:
            ConversionError: it holds NaN or Inf.
        """
        values = self.load(tensor)
        if not is_finite(values):
            raise ConversionError(f"{self.tensors[tensor].file}: tensor {tensor} holds NaN or Inf; {BROKEN}")
        return values

    def load_layer(self, layer: Layer, device: torch.device) -> Iterator[tuple[Matrix, torch.Tensor]]:
        """Yield the matrices of a layer in float32 on ``device``; each source tensor is read once.

        Raises:
            ConversionError: a tensor holds NaN or Inf.
        """
        sources: dict[str, list[Source]] = defaultdict(list)
        for source in layer.matrices:
            sources[source.tensor].append(source)
        for tensor, parts in sources.items():
            values = self.load(tensor)
            for source in parts:
                part = values if source.expert is None else _matrix_of(values[source.expert], source)
                matrix = part.to(device).float()  # in this order: the host would take longer to convert than to copy
                if not torch.isfinite(matrix).all():
                    raise ConversionError(
                        f"{self.tensors[tensor].file}: tensor {tensor} holds NaN or Inf "
                        f"(matrix {source.matrix.name}); {BROKEN}"
                    )
                yield source.matrix, matrix


def _matrix_of(expert: torch.Tensor, source: Source) -> torch.Tensor:
    """Return a matrix [N, K] of the two or one that an expert has in a fused tensor."""
    return expert[:, source.rows].mT if source.transposed else expert[source.rows]
