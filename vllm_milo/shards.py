"""The tensors of a model folder, read from the headers of its safetensors files. Pure Python.

Nothing is loaded: a header tells every tensor's dtype, shape and place, and the file's size tells whether
it is whole. Folders may be strangers': nothing that a file states is believed before it is checked against the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .dtypes import DTYPES
from .values import is_deep, shown, shown_name

INDEX_NAME = "model.safetensors.index.json"
LARGEST_JSON = 128 * 2**20
"""Bytes of a JSON file; tokenizers and indexes of the largest models take a third of it."""
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, by the format."""
LONGEST_NAME = 500
"""Characters of a tensor's name."""
MOST_DIMENSIONS = 8
_OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".npz")
"""Ends of the names of weights that are not read."""
_LARGEST_SIZE = 2**48
"""Of a dimension and of an offset in bytes."""


class ShardError(ValueError):
    """A model folder cannot be read; the message names the file and what to do."""


class TensorEntry(NamedTuple):
    """Where a tensor is, its safetensors dtype name ("BF16", "I32", …) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class _DuplicateKey(ValueError):
    """A JSON object holds a key twice."""


def read_json(path: Path, unique: bool = False) -> Any:
    """Return the content of a JSON file.

    Args:
        path: of the file.
        unique: refuse objects that hold a key twice, of which others might read the other value.

    Raises:
        ShardError: the file is missing, unreadable, too large, nested too deeply or not JSON.
    """
    try:
        with _open(path) as file:
            data = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_JSON:
        raise ShardError(f"{path}: has more than {LARGEST_JSON // 2**20} MiB, which no model's settings have")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not valid JSON: {error}; copy it again") from None
    if is_deep(content):
        raise ShardError(f"{path}: its lists and objects are nested more deeply than any settings are; copy it again")
    return content


def _what_of(folder: Path) -> str:
    """Return what to say of a folder that lacks a file which models have."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if found := _other_weights(folder):
        return f"{folder} holds {found}, which is not read; give the model in safetensors, with its config.json"
    return f"is {folder} a Hugging Face model folder?"


def _other_weights(folder: Path) -> str | None:
    """Return the name of a file with weights in a format that is not read, None where there is none."""
    return min((path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS), default=None)


def read_object(path: Path, unique: bool = False) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object, as config.json and the index do.

    Raises:
        ShardError: see :func:`read_json`, or the file holds something else.
    """
    content = read_json(path, unique)
    if not isinstance(content, dict):
        raise ShardError(f"{path}: must hold a JSON object, found {_as_json(content)}; copy it again")
    return content


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file, after checking that the file is as long as it must be.

    Raises:
        ShardError: the file is missing, unreadable, truncated or no safetensors file.
    """
    try:
        with _open(path, "the folder is incomplete, copy it again") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ShardError(f"{path}: truncated or not a safetensors file ({size} bytes); copy it again")
            if length > LARGEST_HEADER:
                raise ShardError(f"{path}: its header has {length} bytes, more than the format allows; copy it again")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: not a safetensors file: {error}") from None
    entries, end = _read_entries(path, header)
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "too long"
        raise ShardError(f"{path}: {what}: {size} bytes, but its header describes {8 + length + end}; copy it again")
    return entries


def _open(path: Path, advice: str = "") -> BinaryIO:
    """Open a regular file: a pipe or a device would wait for ever, or never end.

    Where there is none, ``advice`` says what to do; by default it is looked up in the folder.
    """
    try:
        if path.exists() and not path.is_file():
            raise ShardError(f"{path}: cannot be read: Is a directory or no regular file; copy it again")
        return path.open("rb")
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; {advice or _what_of(path.parent)}") from None
    except ValueError as error:  # a path with a zero byte
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{shown_name(str(path))}: no such file; {advice or _what_of(path.parent)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKey(f"it holds the key {shown(twice)} twice")
    return content


def _read_entries(path: Path, header: Any) -> tuple[dict[str, TensorEntry], int]:
    """Return the tensors of a header, and the bytes of all their values, which must lie one after another."""
    if not isinstance(header, dict):
        raise _damaged(path, "it is no object")
    entries: dict[str, TensorEntry] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise _damaged(path, "its metadata is no object of texts")
            continue
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            raise _damaged(path, f"{shown(name)} is no name of a tensor")
        entries[name], begin, end = _read_entry(path, name, entry)
        places.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(places):
        if begin != last:
            raise _damaged(path, f"tensor {shown_name(name)} begins at byte {begin} and not at {last}")
        last = end
    return entries, last


def _read_entry(path: Path, name: str, entry: Any) -> tuple[TensorEntry, int, int]:
    """Return a tensor of a header, and the first byte of its values and the one after the last."""
    held: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = held.get("dtype")
    shape: Any = held.get("shape")
    offsets: Any = held.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"it says of tensor {shown_name(name)} {shown(entry)}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].size if dtype in DTYPES else end - begin
    if end - begin != needed or needed < 0:
        raise _damaged(path, f"tensor {shown_name(name)} has {end - begin} bytes, and {needed} by dtype and shape")
    return TensorEntry(path, shown_name(dtype), tuple(shape)), begin, end


def _are_sizes(values: Any) -> bool:
    """Return whether this is a list of few sizes or places in a file."""
    if not isinstance(values, list) or len(values) > MOST_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value <= _LARGEST_SIZE for value in values)


def _damaged(path: Path, what: str) -> ShardError:
    return ShardError(f"{path}: its header is damaged: {what}; copy it again")


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Return all tensors of a model folder, by name.

    Raises:
        ShardError: no safetensors files, a broken file, a tensor that two files hold, or an index that
            names tensors its files do not hold.
    """
    index = _read_index(folder)
    files = sorted({folder / file for file in index.values()}) or sorted(folder.glob("*.safetensors"))
    if not files:
        found = _other_weights(folder)
        instead = "" if found is None else f" but {found}"
        raise ShardError(
            f"{folder}: holds no *.safetensors file{instead}; other weight formats are not read, give the model in "
            f"safetensors"
        )
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise ShardError(f"{folder}: tensor {name} is in {tensors[name].file.name} and in {file.name}")
            tensors[name] = entry
    for name, file_name in index.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ShardError(
                f"{folder / file_name}: tensor {shown_name(name)} is missing, but {INDEX_NAME} says it is there"
            )
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_object(path, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ShardError(f"{path}: has no weight_map from tensors to files; copy it again")
    for file in weight_map.values():
        if not file.isprintable() or "/" in file or "\\" in file or file in ("", ".", "..") or len(file) > 255:
            raise ShardError(f"{path}: {shown(file)} is no name of a file in the folder; copy it again")
    return weight_map


def _as_json(content: object) -> str:
    text = json.dumps(content)
    return text if len(text) <= 40 else text[:40] + " …"
