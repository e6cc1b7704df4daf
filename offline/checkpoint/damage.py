"""Which files of a checkpoint are not what its manifest says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..durable.files import FileEntry, describe_file
from .manifest import MANIFEST_NAME

_PROSE = ("README", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def is_prose(name: str) -> bool:
    """Return whether a file is for people alone, who may edit or leave it out: README.md, licences and the like."""
    return name.endswith(".md") or name.upper().startswith(_PROSE)


def stray_files(folder: Path, manifest: Mapping[str, FileEntry]) -> list[str]:
    """Return what is wrong with safetensors files that the manifest does not name. Other files may be added."""
    return [
        f"{path.name}: extra, the manifest does not name it; is it of another checkpoint? Remove it"
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in manifest
    ]


def added_files(folder: Path, manifest: Mapping[str, FileEntry]) -> list[str]:
    """Return the names of other files that the manifest does not name: neither hidden ones nor prose."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    known = {MANIFEST_NAME, *manifest, *(path.name for path in folder.glob("*.safetensors"))}
    return [name for name in names if name not in known and not is_prose(name)]


def damaged_files(folder: Path, names: Iterable[str], manifest: Mapping[str, FileEntry]) -> dict[str, str]:
    """Read files of a checkpoint; return by name what is wrong with those that are missing or differ from the manifest.

    Args:
        folder: of the checkpoint.
        names: of the files to read.
        manifest: what the manifest says, by name.
    """
    owners = {entry: name for name, entry in manifest.items()}
    found = {name: _damage(folder / name, manifest[name], owners) for name in names}
    return {name: wrong for name, wrong in found.items() if wrong is not None}


def _damage(path: Path, expected: FileEntry, owners: Mapping[FileEntry, str]) -> str | None:
    """Return what is wrong with a file; None for nothing. ``owners`` are the manifest's names by what they hold."""
    if not path.is_file():
        return "missing; copy it again"
    try:
        size = path.stat().st_size
        same = size == expected.size or any(entry.size == size for entry in owners)
        found = describe_file(path) if same else FileEntry(size, "")  # its content would tell nothing more
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found == expected:
        return None
    if found in owners:
        return f"holds what belongs into {owners[found]}; were files swapped?"
    if found.size != expected.size:
        what = "truncated or changed" if found.size < expected.size else "changed"
        return f"{what}: {found.size} bytes, but {expected.size} by the manifest; copy it again"
    return "damaged or changed: its size is right, but its sha256 is not the manifest's; copy it again"
