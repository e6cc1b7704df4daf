"""Refuses a source folder that lacks tensors, or whose tensors do not fit each other."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_milo.names import EXPERT_PROJECTIONS, leaf_of
from vllm_milo.shards import TensorEntry
from vllm_milo.values import shown, shown_name

from ..errors import ConversionError
from ..families.family import Family
from ..nouns import Matrix
from .config import CHOSEN_KEYS
from .formats.settings import advice
from .layers import BROKEN, Layer, layer_index

_QUANTIZED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors or MiLo",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_inv": "FP8",
    "absmax": "bitsandbytes",
}
"""Last parts of tensors' names that only quantized models have, and whose they are."""
_Kind = tuple[bool, str, str]
"""Of a layer: whether it has experts, which mixer, and which kind of it where the family has several."""


def check_names(tensors: Mapping[str, TensorEntry], folder: Path, family: Family) -> None:
    """Refuse tensors that are those of a quantized model, whatever its config.json says, or have another prefix.

    Raises:
        ConversionError: says what was found.
    """
    for name in tensors:
        method = _QUANTIZED.get(name.rpartition(".")[2])
        if method is not None:
            raise ConversionError(
                f"{folder}: the model is quantized already: it holds {name}, as {method} stores it; {advice()}"
            )
    for name in tensors:
        number = re.match(rf"{re.escape(family.in_body)}layers\.([^.]*)", name)
        if number is not None and not re.fullmatch(r"0|[1-9][0-9]{0,4}", number[1]):
            raise ConversionError(f"{folder}: tensor {shown_name(name)}: {shown(number[1])} is no number of a layer")
    if any(family.layer_of(name) for name in tensors):
        return
    alike = [name for name in tensors if re.search(r"\blayers\.\d+\.", name)]
    found = min(alike or tensors, default=None)
    raise ConversionError(
        f"{folder}: holds no tensor named {family.layer_name(0)}.…, "
        + (f"but e.g. {found}; " if found else "and no other; ")
        + f"{family.model_type} has its layers there. Is config.json another model's? If this is a part of a larger "
        "one, as language_model. is, save that part by itself first"
    )


def check_complete(layers: list[Layer], config: Mapping[str, Any], family: Family) -> None:
    """Refuse a folder that lacks a layer, or a tensor that the other layers of its kind have."""
    numbers = {number for layer in layers if (number := layer_index(layer.name)) is not None}
    found = family.num_layers(config)
    stated = len(numbers) if found is None else int(found)
    for number in range(stated):
        if number not in numbers:
            raise ConversionError(f"{family.layer_name(number)}: missing; are the model's files complete?")
    extra = sorted(number for number in numbers if number >= stated)
    if extra:
        raise ConversionError(
            f"{family.layer_name(extra[0])}: extra, config.json states {family.num_layers_key} {stated}; is it another "
            f"model's, or a layer that predicts more tokens, which this family does not have? Leave it out of the files"
        )
    contents = {layer.name: _contents(layer, family) for layer in layers if layer_index(layer.name) is not None}
    kinds: dict[_Kind, dict[str, frozenset[str]]] = defaultdict(dict)
    for name, held in contents.items():
        kinds[_kind(name, held, config, family)][name] = held
    for _, alike in sorted(kinds.items(), key=lambda kind: kind[0], reverse=True):
        for name in sorted(frozenset().union(*alike.values())):
            having = [layer_name for layer_name, held in alike.items() if name in held]
            if len(having) == 1 and len(alike) > 2:
                raise ConversionError(
                    f"{having[0]}.{name}: no other layer has it; is it another model's? Leave it out of the files"
                )
            for layer_name in alike:
                if layer_name not in having:
                    raise ConversionError(f"{layer_name}.{name}: missing; are the model's files complete?")
    outside = {tensor for layer in layers if layer_index(layer.name) is None for tensor in layer.others}
    for tensor in (family.embedding, f"{family.last_norm}.weight"):
        if tensor not in outside:
            raise ConversionError(f"{tensor}: missing; are the model's files complete?")
    if not config.get("tie_word_embeddings") and f"{family.head}.weight" not in outside:
        raise ConversionError(f"{family.head}.weight: missing, and config.json does not tie it to the embeddings")


def check_shapes(
    layers: list[Layer], tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], family: Family
) -> None:
    """Refuse a tensor whose shape differs from its like in another layer of its kind."""
    first: dict[tuple[_Kind, str], str] = {}
    for layer in layers:
        if layer_index(layer.name) is None:
            continue
        names = sorted({source.tensor for source in layer.matrices} | set(layer.others))
        kind = _kind(layer.name, _contents(layer, family), config, family)
        for name in names:
            like = first.setdefault((kind, name.removeprefix(layer.name)), name)
            if tensors[name].shape != tensors[like].shape:
                raise ConversionError(
                    f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, "
                    f"but {like} has {list(tensors[like].shape)}; {BROKEN}"
                )


def check_stated(
    matrices: list[Matrix], tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], family: Family
) -> None:
    """Refuse a config.json whose numbers are not those of the tensors: whoever runs the model builds it by them.

    Args:
        matrices: of the model.
        tensors: of the model; the embedding is there.
        config: of the text model; a number that is missing or null is not looked at.
        family: of the model.

    Raises:
        ConversionError: names the key, and what contradicts it.
    """
    embedding, experts = family.embedding, family.num_experts(config)
    shape = tensors[embedding].shape
    if len(shape) != 2:
        raise ConversionError(
            f"{tensors[embedding].file}: tensor {embedding} must have 2 dimensions, found {list(shape)}"
        )
    for key, side in zip(("vocab_size", "hidden_size"), shape, strict=True):
        _compare(config, key, side, f"{embedding} has shape {list(shape)}")
    for matrix in matrices:
        if matrix.expert is not None and EXPERT_PROJECTIONS[leaf_of(matrix.name)] == "up":
            _compare(config, "moe_intermediate_size", matrix.n, f"{matrix.name} has {matrix.n} rows")
            break
    for key in CHOSEN_KEYS:
        chosen = config.get(key)
        if type(chosen) is int and not 1 <= chosen <= experts:
            raise ConversionError(f"config.json: {key} is {chosen}, but a layer has {experts} experts to choose from")


def _compare(config: Mapping[str, Any], key: str, found: int, what: str) -> None:
    stated = config.get(key)
    if type(stated) is int and stated != found:
        raise ConversionError(f"config.json: {key} is {stated}, but {what}; is one of the two of another model?")


def check_routers(layers: list[Layer], tensors: Mapping[str, TensorEntry], family: Family, choices: int) -> None:
    """Refuse routed experts without what chooses among them, or with what chooses among another number of experts.

    Raises:
        ConversionError: names the router's weight.
    """
    for layer in layers:
        if all(source.matrix.experts is None for source in layer.matrices):
            continue
        name = f"{layer.name}.{family.router}.weight"
        tensor = next((other for other in layer.others if family.checkpoint_name(other) == name), None)
        if tensor is None:
            raise ConversionError(f"{name}: missing; are the model's files complete?")
        shape = tensors[tensor].shape
        if shape[:1] != (choices,):
            raise ConversionError(
                f"{tensors[tensor].file}: tensor {tensor} has shape {list(shape)}, but there are {choices} experts to "
                f"choose from; {BROKEN}"
            )


def check_fused(
    layers: list[Layer], tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], family: Family
) -> None:
    """Refuse fused experts whose sides are not those of [E, N, K], as some families store them the other way round.

    Raises:
        ConversionError: names the tensor, its shape and the hidden size.
    """
    hidden = family.experts_width(config)
    for source in (source for layer in layers for source in layer.matrices if source.expert is not None):
        role = EXPERT_PROJECTIONS[leaf_of(source.matrix.name)]
        side = source.matrix.n if role == "down" else source.matrix.k
        if hidden and side != hidden:
            entry = tensors[source.tensor]
            raise ConversionError(
                f"{entry.file}: fused experts {source.tensor} have shape {list(entry.shape)}, but the hidden size "
                f"{hidden} must be the {'second' if role == 'down' else 'last'} of their sizes: are they transposed? "
                f"Save the model with transformers' save_pretrained first"
            )


def _kind(name: str, held: frozenset[str], config: Mapping[str, Any], family: Family) -> _Kind:
    """Return what a layer has in common with those that hold the same: experts, mixer, and what config.json says."""
    mixers = [mixer for mixer in family.mixers if any(f"{part}.".startswith(f"{mixer}.") for part in held)]
    if len(family.mixers) > 1 and len(mixers) != 1:
        found = " and ".join(mixers) or "neither"
        raise ConversionError(f"{name}: must have one of {' and '.join(family.mixers)}, has {found}; {BROKEN}")
    stated: list[Any] = next((config[key] for key in family.layer_kinds_keys if isinstance(config.get(key), list)), [])
    index = layer_index(name)
    kind = str(stated[index]) if index is not None and index < len(stated) else ""
    return any(re.search(r"\bexperts\.", part) for part in held), mixers[0] if mixers else "", kind


def _contents(layer: Layer, family: Family) -> frozenset[str]:
    """Return the names a layer holds in checkpoints, relative to it, experts counted as one."""
    copied = {family.checkpoint_name(tensor) for tensor in layer.others}
    names = {source.matrix.name + ".weight" for source in layer.matrices} | copied
    alike = (re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in names)
    return frozenset(name.removeprefix(layer.name + ".") for name in alike)


def check_experts(matrices: list[Matrix], number: int, family: Family) -> None:
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
        expected = len(family.projections.present)
        if len(names) != expected:
            raise ConversionError(f"{experts}: expected {expected} projections an expert, found {sorted(names)}")
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
