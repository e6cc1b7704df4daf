"""Reads a source model folder layer by layer: plain matrices, fused 3-D experts, and everything else."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vllm_milo.shards import TensorEntry, read_json, read_tensors

from .errors import ConversionError
from .families import Family, Kind, find_family
from .ranks import Matrix

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_OUTSIDE = "outside the layers"
_BROKEN = "the source model is broken"
_DTYPE_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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


class ModelReader:
    """A source model: its config, what of it will be quantized, and its tensors on demand.

    Raises:
        ConversionError: no model, an unknown family, or tensors that do not fit the config.
        ShardError: a file is missing, truncated or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder; download the model first")
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        if "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method")
            raise ConversionError(
                f"{folder / 'config.json'}: the model is quantized already ({method}); convert the original"
            )
        self.family: Family = find_family(self.config)
        self.tensors = read_tensors(folder)
        self.layers = _plan(self.tensors, self.family)
        _check_complete(self.layers, self.config)
        _check_shapes(self.layers, self.tensors)
        _check_experts(self.matrices, self.family.num_experts(self.config))

    @property
    def matrices(self) -> list[Matrix]:
        """Return all matrices that the family quantizes, in the order of the layers."""
        return [source.matrix for layer in self.layers for source in layer.matrices]

    @property
    def dtype(self) -> torch.dtype:
        """Return the model's dtype, by its config or else by its first quantizable tensor."""
        stated = self.config.get("dtype", self.config.get("torch_dtype"))
        if stated in _DTYPE_NAMES:
            return _DTYPE_NAMES[stated]
        first = next(source for layer in self.layers for source in layer.matrices)
        return FLOAT_DTYPES[self.tensors[first.tensor].dtype]

    def load(self, tensor: str) -> torch.Tensor:
        """Return a tensor as it is stored, on the CPU."""
        entry = self.tensors[tensor]
        try:
            with safe_open(entry.file, framework="pt") as file:
                return file.get_tensor(tensor)
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{entry.file}: cannot read tensor {tensor}: {error}") from error

    def load_finite(self, tensor: str) -> torch.Tensor:
        """Return a tensor that is copied unquantized.

        Raises:
            ConversionError: it holds NaN or Inf.
        """
        values = self.load(tensor)
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise ConversionError(f"{self.tensors[tensor].file}: tensor {tensor} holds NaN or Inf; {_BROKEN}")
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
                matrix = part.to(device=device, dtype=torch.float32)
                if not torch.isfinite(matrix).all():
                    raise ConversionError(
                        f"{self.tensors[tensor].file}: tensor {tensor} holds NaN or Inf "
                        f"(matrix {source.matrix.name}); {_BROKEN}"
                    )
                yield source.matrix, matrix


def _plan(tensors: Mapping[str, TensorEntry], family: Family) -> list[Layer]:
    layers: dict[str, Layer] = {}
    for tensor, entry in sorted(tensors.items(), key=lambda item: _natural_key(item[0])):
        match = re.match(r"model\.layers\.\d+", tensor)
        name = match[0] if match else _OUTSIDE
        layer = layers.setdefault(name, Layer(name, [], []))
        sources = _sources(tensor, entry, family)
        layer.matrices.extend(sources)
        if not sources:
            layer.others.append(tensor)
    return list(layers.values())


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _sources(tensor: str, entry: TensorEntry, family: Family) -> list[Source]:
    """Return the matrices to quantize that a tensor holds; none for a tensor that is copied."""
    fused = family.fused(tensor)
    if fused is not None:
        return _fused_sources(tensor, entry, fused.experts, fused.projections)
    module, _, leaf = family.checkpoint_name(tensor).rpartition(".")
    kind = family.kind(module) if leaf == "weight" else None
    if kind is None:
        return []
    if len(entry.shape) != 2:
        raise ConversionError(f"{entry.file}: tensor {tensor} must have 2 dimensions, found {list(entry.shape)}")
    _check_float(tensor, entry)
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
    _check_float(tensor, entry)
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


def _check_float(tensor: str, entry: TensorEntry) -> None:
    if entry.dtype not in FLOAT_DTYPES:
        raise ConversionError(
            f"{entry.file}: tensor {tensor} is {entry.dtype}; weights must be one of {', '.join(FLOAT_DTYPES)}"
        )


def _check_complete(layers: list[Layer], config: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks a layer, or a tensor that the other layers of its kind have."""
    numbers = {int(layer.name.rpartition(".")[2]) for layer in layers if layer.name != _OUTSIDE}
    for number in range(int(config.get("num_hidden_layers", len(numbers)))):
        if number not in numbers:
            raise ConversionError(f"model.layers.{number}: missing; are the model's files complete?")
    contents = {layer.name: _contents(layer) for layer in layers if layer.name != _OUTSIDE}
    for has_experts in (True, False):
        alike = {name: held for name, held in contents.items() if any(".experts" in n for n in held) is has_experts}
        for name in sorted(frozenset().union(*alike.values())):
            for layer_name, held in alike.items():
                if name not in held:
                    raise ConversionError(f"{layer_name}.{name}: missing; are the model's files complete?")
    outside = {tensor for layer in layers if layer.name == _OUTSIDE for tensor in layer.others}
    for tensor in ("model.embed_tokens.weight", "model.norm.weight"):
        if tensor not in outside:
            raise ConversionError(f"{tensor}: missing; are the model's files complete?")
    if not config.get("tie_word_embeddings") and "lm_head.weight" not in outside:
        raise ConversionError("lm_head.weight: missing, and config.json does not tie it to the embeddings")


def _check_shapes(layers: list[Layer], tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse a tensor whose shape differs from its like in another layer: the layers of these families are alike."""
    first: dict[tuple[bool, str], str] = {}
    for layer in layers:
        if layer.name == _OUTSIDE:
            continue
        names = sorted({source.tensor for source in layer.matrices} | set(layer.others))
        has_experts = any(".experts" in name for name in names)
        for name in names:
            like = first.setdefault((has_experts, name.removeprefix(layer.name)), name)
            if tensors[name].shape != tensors[like].shape:
                raise ConversionError(
                    f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, "
                    f"but {like} has {list(tensors[like].shape)}; {_BROKEN}"
                )


def _contents(layer: Layer) -> frozenset[str]:
    """Return the names a layer holds, relative to it, experts counted as one."""
    names = {source.matrix.name + ".weight" for source in layer.matrices} | set(layer.others)
    relative = (name.removeprefix(layer.name + ".") for name in names)
    return frozenset(re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in relative)


def _check_experts(matrices: list[Matrix], number: int) -> None:
    """Refuse a folder that lacks experts, or whose experts' shapes differ: a tensor is missing or wrong."""
    members: dict[tuple[str, str], dict[int, Matrix]] = defaultdict(dict)
    projections: dict[str, set[str]] = defaultdict(set)
    for matrix in matrices:
        if matrix.experts is not None and matrix.expert is not None:
            projection = matrix.name.rpartition(".")[2]
            members[matrix.experts, projection][matrix.expert] = matrix
            projections[matrix.experts].add(projection)
    if not members:
        raise ConversionError("the model holds no expert weights; are its files complete?")
    for experts, names in projections.items():
        if len(names) != 3:
            raise ConversionError(f"{experts}: expected 3 projections an expert, found {sorted(names)}")
    for (experts, projection), found in members.items():
        missing = [index for index in range(number) if index not in found]
        if missing or len(found) != number:
            raise ConversionError(
                f"{experts}: config.json states {number} experts, but {projection} is there for {len(found)}"
                + (f"; expert {missing[0]} is missing" if missing else "")
            )
        shapes = {(matrix.n, matrix.k) for matrix in found.values()}
        if len(shapes) != 1:
            raise ConversionError(f"{experts}: {projection} has experts of different shapes: {sorted(shapes)}")
