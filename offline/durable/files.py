"""Files that are whole or absent: written beside their name, flushed to the disk, renamed, and then described."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

UNFINISHED = ".tmp"
"""Ends the name of a file that is still being written."""
DISCARDED = ".milo-discarded"
"""Ends the name of a folder that is being deleted."""


class FileEntry(NamedTuple):
    """What is known of a file: its size in bytes and its sha256 in hexadecimal digits."""

    size: int
    sha256: str


def describe_file(path: Path) -> FileEntry:
    """Read a file once; return its size and sha256.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(file.tell(), digest)


def flush(path: Path) -> None:
    """Let a file's content or a folder's names reach the disk.

    Raises:
        OSError: it cannot be opened, or the disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is on the disk, whole, when this returns; a kill leaves what was there before.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    beside = path.with_name(path.name + UNFINISHED)
    beside.write_text(json.dumps(content), encoding="utf-8")
    _place(beside, path)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """Write a safetensors file of CPU tensors like :func:`write_json`; return its size and sha256.

    Raises:
        OSError, SafetensorError: the disk is full, or the folder cannot be written.
    """
    beside = path.with_name(path.name + UNFINISHED)
    save_tensors(beside, tensors)
    entry = describe_file(beside)  # while the system still has it in memory
    _place(beside, path)
    return entry


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file of CPU tensors with the permissions that any other new file gets.

    The library leaves it to the owner alone, and whoever serves a checkpoint may be another user.

    Raises:
        OSError, SafetensorError: the disk is full, or the folder cannot be written.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def _place(beside: Path, path: Path) -> None:
    flush(beside)
    os.replace(beside, path)
    flush(path.parent)


def discard(folder: Path) -> None:
    """Delete a folder that may be absent. It loses its name at once, so that a kill leaves no half of it under it."""
    discard_rest(folder)
    away = folder.with_name(folder.name + DISCARDED)
    if not folder.exists():
        return
    try:
        os.replace(folder, away)
    except OSError:
        away = folder  # the parent may not be written any more; what can be deleted goes
    shutil.rmtree(away, ignore_errors=True)


def discard_rest(folder: Path) -> None:
    """Delete what is left of a folder that a killed process was discarding."""
    shutil.rmtree(folder.with_name(folder.name + DISCARDED), ignore_errors=True)
