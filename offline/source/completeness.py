"""Refuses a source folder that lacks tensors, or whose tensors do not fit each other."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_milo.shards import TensorEntry
from vllm_milo.values import shown, shown_name

from ..errors import ConversionError
from ..nouns import Matrix
from .layers import BROKEN, OUTSIDE, Layer

_QUANTIZED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors or MiLo",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_inv": "FP8",
    "absmax": "bitsandbytes",
}
"""Last parts of tensors' names that only quantized models have, and whose they are."""


def check_names(tensors: Mapping[str, TensorEntry], folder: Path) -> None:
    """Refuse tensors that are those of a quantized model, whatever its config.json says, or have another prefix.

    Raises:
        ConversionError: says what was found.
    """
    for name in tensors:
        method = _QUANTIZED.get(name.rpartition(".")[2])
        if method is not None:
            raise ConversionError(
                f"{folder}: the model is quantized already: it holds {name}, as {method} stores it; "
                f"convert the original"
            )
    for name in tensors:
        number = re.match(r"model\.layers\.([^.]*)", name)
        if number is not None and not re.fullmatch(r"0|[1-9][0-9]{0,4}", number[1]):
            raise ConversionError(f"{folder}: tensor {shown_name(name)}: {shown(number[1])} is no number of a layer")
    if any(re.match(r"model\.layers\.\d+\.", name) for name in tensors):
        return
    alike = [name for name in tensors if re.search(r"\blayers\.\d+\.", name)]
    found = min(alike or tensors, default=None)
    raise ConversionError(
        f"{folder}: holds no tensor named model.layers.0.…, "
        + (f"but e.g. {found}; " if found else "and no other; ")
        + "MiLo converts text models alone: if it is a part of a larger one, as language_model. is, save that part "
        "by itself first"
    )


def check_complete(layers: list[Layer], config: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks a layer, or a tensor that the other layers of its kind have."""
    numbers = {int(layer.name.rpartition(".")[2]) for layer in layers if layer.name != OUTSIDE}
    stated = int(config.get("num_hidden_layers") or len(numbers))
    for number in range(stated):
        if number not in numbers:
            raise ConversionError(f"model.layers.{number}: missing; are the model's files complete?")
    extra = sorted(number for number in numbers if number >= stated)
    if extra:
        raise ConversionError(
            f"model.layers.{extra[0]}: extra, config.json states num_hidden_layers {stated}; is it another model's, or "
            f"a layer that predicts more tokens, which this family does not have? Leave it out of the files"
        )
    contents = {layer.name: _contents(layer) for layer in layers if layer.name != OUTSIDE}
    for has_experts in (True, False):
        alike = {name: held for name, held in contents.items() if any(".experts" in n for n in held) is has_experts}
        for name in sorted(frozenset().union(*alike.values())):
            for layer_name, held in alike.items():
                if name not in held:
                    raise ConversionError(f"{layer_name}.{name}: missing; are the model's files complete?")
    outside = {tensor for layer in layers if layer.name == OUTSIDE for tensor in layer.others}
    for tensor in ("model.embed_tokens.weight", "model.norm.weight"):
        if tensor not in outside:
            raise ConversionError(f"{tensor}: missing; are the model's files complete?")
    if not config.get("tie_word_embeddings") and "lm_head.weight" not in outside:
        raise ConversionError("lm_head.weight: missing, and config.json does not tie it to the embeddings")


def check_shapes(layers: list[Layer], tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse a tensor whose shape differs from its like in another layer: the layers of these families are alike."""
    first: dict[tuple[bool, str], str] = {}
    for layer in layers:
        if layer.name == OUTSIDE:
            continue
        names = sorted({source.tensor for source in layer.matrices} | set(layer.others))
        has_experts = any(".experts" in name for name in names)
        for name in names:
            like = first.setdefault((has_experts, name.removeprefix(layer.name)), name)
            if tensors[name].shape != tensors[like].shape:
                raise ConversionError(
                    f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, "
                    f"but {like} has {list(tensors[like].shape)}; {BROKEN}"
                )


def _contents(layer: Layer) -> frozenset[str]:
    """Return the names a layer holds, relative to it, experts counted as one."""
    names = {source.matrix.name + ".weight" for source in layer.matrices} | set(layer.others)
    relative = (name.removeprefix(layer.name + ".") for name in names)
    return frozenset(re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in relative)


def check_experts(matrices: list[Matrix], number: int) -> None:
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
        missing = next((index for index in range(number) if index not in found), None)
        if missing is not None or len(found) != number:
            raise ConversionError(
                f"{experts}: config.json states {number} experts, but {projection} is there for {len(found)}"
                + (f"; expert {missing} is missing" if missing is not None else "")
            )
        shapes = {(matrix.n, matrix.k) for matrix in found.values()}
        if len(shapes) != 1:
            raise ConversionError(f"{experts}: {projection} has experts of different shapes: {sorted(shapes)}")
