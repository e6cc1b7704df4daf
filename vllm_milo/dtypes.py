"""Element types by the names that safetensors headers, config.json and torch give them, in one table. Pure Python."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """An element type: torch's name of it (``getattr(torch, name)``) and its bytes."""

    torch_name: str
    size: int


DTYPES = {
    "BF16": DType("bfloat16", 2),
    "F16": DType("float16", 2),
    "F32": DType("float32", 4),
    "F64": DType("float64", 8),
    "F8_E4M3": DType("float8_e4m3fn", 1),
    "F8_E5M2": DType("float8_e5m2", 1),
    "BOOL": DType("bool", 1),
    "U8": DType("uint8", 1),
    "I8": DType("int8", 1),
    "I16": DType("int16", 2),
    "I32": DType("int32", 4),
    "I64": DType("int64", 8),
    "U16": DType("uint16", 2),
    "U32": DType("uint32", 4),
    "U64": DType("uint64", 8),
}
"""By safetensors' names."""

MODEL_DTYPES = ("BF16", "F16", "F32")
"""Dtypes that weights of a source model, and 16-bit factors, may have."""

_BY_TORCH_NAME = {dtype.torch_name: name for name, dtype in DTYPES.items()}


def safetensors_name(torch_name: str) -> str | None:
    """Return safetensors' name of the dtype that torch or config.json calls ``torch_name``; None if it has none."""
    return _BY_TORCH_NAME.get(torch_name.removeprefix("torch."))
