"""The tensors of a model folder, read from the headers of its safetensors files. Pure Python.

Nothing is loaded: a header tells every tensor's dtype, shape and place, and the file's size tells whether
it is whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

INDEX_NAME = "model.safetensors.index.json"


class ShardError(ValueError):
    """A model folder cannot be read; the message names the file and what to do."""


class TensorEntry(NamedTuple):
    """Where a tensor is, its safetensors dtype name ("BF16", "I32", …) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ShardError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; is {path.parent} a Hugging Face model folder?") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not valid JSON: {error}; copy it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object, as config.json and the index do.

    Raises:
        ShardError: the file is missing, unreadable, not JSON, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        shown = json.dumps(content)
        raise ShardError(
            f"{path}: must hold a JSON object, found {shown if len(shown) <= 40 else shown[:40] + ' …'}; copy it again"
        )
    return content


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file, after checking that the file is as long as it must be.

    Raises:
        ShardError: the file is missing, unreadable, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ShardError(f"{path}: truncated or not a safetensors file ({size} bytes); copy it again")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; the folder is incomplete, copy it again") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: not a safetensors file: {error}") from None
    entries, end = _read_entries(path, header)
    if size != 8 + length + end:
        raise ShardError(f"{path}: truncated: {size} bytes, but its header describes {8 + length + end}; copy it again")
    return entries


def _read_entries(path: Path, header: Any) -> tuple[dict[str, TensorEntry], int]:
    """Return the tensors of a header, and the bytes of all their values."""
    try:
        header.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        entries = {
            name: TensorEntry(path, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ShardError(f"{path}: its header is damaged; copy it again") from None
    return entries, max(ends, default=0)


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Return all tensors of a model folder, by name.

    Raises:
        ShardError: no safetensors files, a broken file, a tensor that two files hold, or an index that
            names tensors its files do not hold.
    """
    index = _read_index(folder)
    files = sorted({folder / file for file in index.values()}) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ShardError(f"{folder}: holds no *.safetensors file; other weight formats are not read")
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise ShardError(f"{folder}: tensor {name} is in {tensors[name].file.name} and in {file.name}")
            tensors[name] = entry
    for name, file_name in index.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ShardError(f"{folder / file_name}: tensor {name} is missing, but {INDEX_NAME} says it is there")
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ShardError(f"{path}: has no weight_map from tensors to files; copy it again")
    return weight_map
