"""The manifest that lies in every new checkpoint: the size and the sha256 of each other file but README.md.

    {"format_version": 1, "files": {"config.json": {"size": 2113, "sha256": "…"}, …}}

Names are paths in the folder, with ``/``, sorted; nothing in it depends on the machine or the time. A checkpoint
without a manifest is valid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import read_json
from vllm_milo.values import one_line, shown

from ..durable.files import FileEntry, describe_file

MANIFEST_NAME = "milo_manifest.json"
CARD_NAME = "README.md"
"""The model card, which the manifest leaves out: people edit it, and `milo eval` writes into it."""
MANIFEST_VERSION = 1


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
    content = read_json(path, unique=True)
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is int and version > MANIFEST_VERSION:
        raise CheckpointError(f"{path}: format_version {shown(version)}; known is {MANIFEST_VERSION}, update vllm-milo")
    try:
        if version != MANIFEST_VERSION:
            raise ValueError(f"format_version is {shown(version)}")
        return {name: _read_entry(name, entry) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: no manifest of a MiLo checkpoint ({one_line(error)}); copy it again") from None


def is_file_name(name: str) -> bool:
    """Return whether a manifest may list a path of a file in its folder."""
    good = re.fullmatch(r"[^/\\\0]+(/[^/\\\0]+)*", name) and name.isprintable() and len(name) <= 1000
    return bool(good) and not {".", ".."} & set(name.split("/"))


def _read_entry(name: str, entry: Mapping[str, Any]) -> FileEntry:
    """Return an entry, after checking that it is one, of a file in the folder: manifests may be downloaded."""
    if not is_file_name(name):
        raise ValueError(f"{shown(name)} is no file name")
    size, digest = entry["size"], entry["sha256"]
    if type(size) is not int or not 0 <= size < 2**63 or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"size and sha256 of {name} are {shown(size)} and {shown(digest)}")
    return FileEntry(size, digest)
