"""Reads a source model folder: its config, its plan of layers, and its tensors on demand."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_milo.dtypes import DTYPES, MODEL_DTYPES, safetensors_name
from vllm_milo.names import find_key
from vllm_milo.shards import read_tensors
from vllm_milo.values import one_line

from ..errors import ConversionError, PassingError
from ..families.family import Family
from ..families.find import find_family
from ..nouns import Matrix
from .completeness import check_complete, check_experts, check_fused, check_names, check_shapes
from .config import read_config
from .finite import is_finite
from .layers import BROKEN, Layer, Source, plan_layers


class _Opened(threading.local):
    """The shard that a thread has open."""

    def __init__(self) -> None:
        self._last: tuple[Path, Any] | None = None

    def shard(self, path: Path) -> Any:
        """Return a shard, which stays open until another is wanted: thousands of tensors lie in one."""
        if self._last is None or self._last[0] != path:
            self._last = (path, safe_open(path, framework="pt"))
        return self._last[1]


class ModelReader:
    """A source model: its config, what of it will be quantized, and its tensors on demand, in any thread.

    Raises:
        ConversionError: no model, an unknown family, or tensors that do not fit the config.
        ShardError: a file is missing, truncated or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder; download the model first")
        self.folder = folder
        self._opened = _Opened()
        self.config: dict[str, Any] = read_config(folder)
        self.family: Family = find_family(self.config)
        self.tensors = read_tensors(folder)
        check_names(self.tensors, folder)
        self.layers = plan_layers(self.tensors, self.family, self.config.get("num_hidden_layers"))
        check_complete(self.layers, self.config, self.family)
        check_shapes(self.layers, self.tensors, self.family)
        check_fused(self.layers, self.tensors, self.config)
        check_experts(self.matrices, self.family.num_experts(self.config))

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
        number = self.config.get("num_hidden_layers")
        ahead = dict.fromkeys(family.ahead_pattern(tensor, number) for tensor in self.tensors)
        return (*patterns, *exact, *(pattern for pattern in ahead if pattern is not None))

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
        entry = self.tensors[tensor]
        try:
            return self._opened.shard(entry.file).get_tensor(tensor)
        except (OSError, SafetensorError) as error:
            raise PassingError(f"{entry.file}: cannot read tensor {tensor}: {one_line(error)}") from error

    def load_matrix(self, source: Source) -> torch.Tensor:
        """Return a matrix as it is stored, on the CPU; of a tensor that holds several, no more is read."""
        if source.expert is None:
            return self.load(source.tensor)
        entry, expert = self.tensors[source.tensor], source.expert
        try:
            part = self._opened.shard(entry.file).get_slice(source.tensor)[expert : expert + 1, source.rows]
        except (OSError, SafetensorError) as error:
            raise PassingError(f"{entry.file}: cannot read tensor {source.tensor}: {one_line(error)}") from error
        return part[0]

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
                part = values if source.expert is None else values[source.expert, source.rows]
                matrix = part.to(device).float()  # in this order: the host would take longer to convert than to copy
                if not torch.isfinite(matrix).all():
                    raise ConversionError(
                        f"{self.tensors[tensor].file}: tensor {tensor} holds NaN or Inf "
                        f"(matrix {source.matrix.name}); {BROKEN}"
                    )
                yield source.matrix, matrix
