"""The tensors that a conversion is going to write, known from the source's headers alone, and what they take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_milo.checkpoint import MiLoFormat
from vllm_milo.dtypes import DTYPES
from vllm_milo.shards import TensorEntry
from vllm_milo.validation import find_problems, first_problems

from ..errors import ConversionError
from ..source.layers import Layer
from ..source.reader import ModelReader
from .head import stored_as

_JSON_TENSOR = 340
"""About the bytes of JSON for each quantized matrix in the report, and for each tensor in headers and the index beside
its name, twice."""
_JSON_FIXED = 65536


def planned_tensors(
    reader: ModelReader, layers: Sequence[Layer], fmt: MiLoFormat, ranks: Mapping[str, int], model_dtype: str
) -> dict[str, TensorEntry]:
    """Return dtype and shape of each tensor that a conversion writes, by name; ``file`` is where it comes from.

    Args:
        reader: the source model.
        layers: its layers, with the matrices to quantize in each.
        fmt: group sizes, factor bits, bits of the head.
        ranks: of these matrices, by name.
        model_dtype: safetensors' name of the dtype of 16-bit factors.

    Raises:
        ConversionError: two tensors would get one name, or one has a dtype that nothing here reads.
    """
    planned: dict[str, TensorEntry] = {}

    def add(name: str, source: str, dtype: str, shape: tuple[int, ...]) -> None:
        file = reader.tensors[source].file
        if name in planned:
            raise ConversionError(f"{file}: tensor {source} is there twice: {name} comes from another tensor too")
        planned[name] = TensorEntry(file, dtype, shape)

    for layer in layers:
        for source in layer.matrices:
            name, _, n, k, *_ = source.matrix
            specs = fmt.base_tensors(n, k, fmt.module_group_size(name))
            specs |= fmt.factor_tensors(n, k, ranks[name], model_dtype)
            for tensor, (dtype, shape) in specs.items():
                add(f"{name}.{tensor}", source.tensor, dtype, shape)
        for tensor in layer.others:
            entry = reader.tensors[tensor]
            if entry.dtype not in DTYPES:
                raise ConversionError(
                    f"{entry.file}: tensor {tensor} is {entry.dtype}; tensors are copied that are one of "
                    f"{', '.join(DTYPES)}: convert it first"
                )
            name = reader.family.checkpoint_name(tensor)
            for part, (dtype, shape) in stored_as(reader, name, entry, fmt.lm_head_bits).items():
                add(part, tensor, dtype, shape)
    return planned


def refuse_broken_plan(
    folder: Path, tensors: Mapping[str, TensorEntry], fmt: MiLoFormat, config: Mapping[str, Any]
) -> None:
    """Refuse a conversion whose result would break the format, which is else found when everything is written.

    Args:
        folder: the source model's, for the message.
        tensors: what :func:`planned_tensors` returned.
        fmt: the format of the result, with ranks.
        config: the config.json of the result.

    Raises:
        ConversionError: lists the first problems.
    """
    problems = find_problems(tensors, fmt, config)
    if problems:
        raise ConversionError(
            f"{folder}: cannot be stored in format_version 1, nothing was done: {'; '.join(first_problems(problems))}"
        )


def bytes_of(tensors: Mapping[str, TensorEntry]) -> int:
    """Return the bytes of the values of some tensors."""
    return sum(math.prod(entry.shape) * DTYPES[entry.dtype].size for entry in tensors.values())


def bytes_of_json(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> int:
    """Return about how many bytes headers, index, report and config take beside the tensors; rather more than less."""
    names = sum(2 * len(name) for name in tensors)
    return _JSON_FIXED + len(json.dumps(config, indent=2)) + names + _JSON_TENSOR * len(tensors)
