"""The manifest that lies in every new checkpoint: the size and the sha256 of each other file but README.md.

    {"format_version": 1, "files": {"config.json": {"size": 2113, "sha256": "…"}, …}}

Names are paths in the folder, with ``/``, sorted; nothing in it depends on the machine or the time. A checkpoint
without a manifest is valid.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import read_json

MANIFEST_NAME = "milo_manifest.json"
CARD_NAME = "README.md"
"""The model card, which the manifest leaves out: people edit it, and `milo eval` writes into it."""
MANIFEST_VERSION = 1


class FileEntry(NamedTuple):
    """What the manifest says of a file: its size in bytes and its sha256 in hexadecimal digits."""

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


def describe_folder(folder: Path, known: Mapping[str, FileEntry]) -> dict[str, Any]:
    """Return the manifest of a folder's files.

    Args:
        folder: of the checkpoint.
        known: files that need not be read, by name.

    Raises:
        OSError: a file cannot be read.
    """
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in paths if name not in (MANIFEST_NAME, CARD_NAME))
    files = {name: (known.get(name) or describe_file(folder / name))._asdict() for name in names}
    return {"format_version": MANIFEST_VERSION, "files": files}


def read_manifest(folder: Path) -> dict[str, FileEntry] | None:
    """Return what the manifest of a checkpoint says of each file, by name; None where there is no manifest.

    Raises:
        CheckpointError: it has another version, or is no manifest.
        ShardError: it cannot be read, or is not JSON.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise CheckpointError(f"{path}: format_version {version}; known is {MANIFEST_VERSION}, update vllm-milo")
    try:
        if version != MANIFEST_VERSION:
            raise ValueError(f"format_version is {version!r}")
        return {name: _read_entry(name, entry) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: no manifest of a MiLo checkpoint ({error}); copy it again") from None


def _read_entry(name: str, entry: Mapping[str, Any]) -> FileEntry:
    """Return an entry, after checking that it is one, of a file in the folder: manifests may be downloaded."""
    if not re.fullmatch(r"[^/\\\0]+(/[^/\\\0]+)*", name) or {".", ".."} & set(name.split("/")):
        raise ValueError(f"{name!r} is no file name")
    size, digest = entry["size"], entry["sha256"]
    if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"size and sha256 of {name} are {size!r} and {digest!r}")
    return FileEntry(size, digest)
