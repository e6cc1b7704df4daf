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
from .config import read_settings
from .finite import is_finite
from .formats.fused import FusedEncoding
from .formats.plain import PlainView, view_plain
from .formats.scheme import Scheme
from .formats.settings import find_schemes
from .layers import BROKEN, Layer, Source, plan_layers
from .parts import Opened, Part, Stored, on_device, read_part, read_whole

Uses = Mapping[str, Sequence[str]]
"""The names of the shards that hold a layer, by the layer's name, in the order that layers are worked on."""
CPU = torch.device("cpu")


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


class SourceTensors:
    """The tensors of a source model on demand, in any thread, as if it were in 16 bits whatever it is stored as.

    Args:
        settings: the model's config.json.
        schemes: how its matrices may be stored, by that.
        shards: its files of weights.

    Raises:
        ConversionError: the model's tensors are not those of its format.
    """

    def __init__(self, settings: Mapping[str, Any], schemes: Sequence[Scheme], shards: Shards) -> None:
        self.shards = shards
        stated = safetensors_name(str(settings.get("dtype", settings.get("torch_dtype"))))
        self.view: PlainView = view_plain(shards.tensors, schemes, stated if stated in MODEL_DTYPES else "BF16")

    def part(self, tensor: str, expert: int | None = None, rows: slice = slice(None), transposed: bool = False) -> Part:
        """Return where a tensor, or of one that holds several matrices one, lies in the model's files."""
        file, encoding = self.view.tensors[tensor].file, self.view.encodings.get(tensor)
        if isinstance(encoding, FusedEncoding):
            return Part(file, tensor, encoding=encoding.matrix(expert or 0, rows))
        return Part(file, tensor, expert, rows, transposed, encoding)

    def load(self, tensor: str, device: torch.device = CPU) -> torch.Tensor:
        """Return a tensor as it is stored, on the CPU; one with fewer than 16 bits a weight as values on ``device``."""
        stored = read_whole(self.part(tensor), self.view.encodings.get(tensor), self.shards.shard)
        return stored if isinstance(stored, torch.Tensor) else on_device(stored, device)


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
        if folder.is_file():
            raise ConversionError(f"{folder}: is a file; give the model's folder, with config.json and safetensors")
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder; download the model first")
        self.folder = folder
        settings = read_settings(folder)
        self.whole_config: dict[str, Any] = {key: one for key, one in settings.items() if key != "quantization_config"}
        self.family: Family = find_family(self.whole_config)
        schemes = find_schemes(settings, folder / "config.json")
        self.config: dict[str, Any] = self.family.settings(self.whole_config)
        self.shards: Shards = FolderShards(folder) if shards is None else shards
        self.source = SourceTensors(self.whole_config | self.config, schemes, self.shards)
        self.tensors = self.source.view.tensors
        check_names(self.tensors, folder, self.family)
        self.layers = plan_layers(self.tensors, self.family, self.config)
        check_complete(self.layers, self.config, self.family)
        check_shapes(self.layers, self.tensors, self.config, self.family)
        check_fused(self.layers, self.tensors, self.config, self.family)
        check_experts(self.matrices, self.family.num_experts(self.config), self.family)
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

    def load(self, tensor: str, device: torch.device = CPU) -> torch.Tensor:
        """Return a tensor as it is stored, on the CPU; one with fewer than 16 bits a weight as values on ``device``."""
        return self.source.load(tensor, device)

    def part(self, source: Source) -> Part:
        """Return where a matrix lies in the model's files."""
        return self.source.part(*source[1:])

    def load_matrix(self, source: Source) -> Stored:
        """Return a matrix as it is stored, on the CPU; of a tensor that holds several, no more is read."""
        return read_part(self.part(source), self.shards.shard)

    def load_finite(self, tensor: str, device: torch.device = CPU) -> torch.Tensor:
        """Return what :meth:`load` does.

        Raises:
            ConversionError: it holds NaN or Inf.
        """
        values = self.load(tensor, device)
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
            values = self.load(tensor, device)
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
