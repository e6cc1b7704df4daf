"""The source's files that come along into a checkpoint: tokenizer, chat templates, remote code, licence."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_milo.shards import INDEX_NAME, read_object
from vllm_milo.values import shown

from ..errors import ConversionError
from ..source.foreign import SETTINGS
from .manifest import CARD_NAME, MANIFEST_NAME, is_file_name
from .report import REPORT_NAME

SOURCE_CARD = "README_SOURCE.md"
"""What the source's README.md is called in a checkpoint, whose own README.md is its model card."""

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".tflite", ".ot", ".onnx_data"),
)
"""Ends of the names of weights, which may hold the model in other formats."""
LONGEST_SHOWN = 300
"""Characters of a path that a warning has as it is."""
_OWN = (CARD_NAME, SOURCE_CARD, MANIFEST_NAME, REPORT_NAME, INDEX_NAME, "config.json")
"""Files that a checkpoint has."""


class Companions(NamedTuple):
    """What is copied, by its path in the folder: where it is read from; and warnings of what is left out."""

    files: dict[str, Path]
    warnings: list[str]

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def copy(self, target: Path) -> None:
        """Copy all files into a folder.

        Raises:
            OSError: a file cannot be read or written.
        """
        for name, path in self.files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def find_companions(source: Path) -> Companions:
    """Return the files of a model folder, and of the folders in it, that are neither weights, config nor hidden.

    Links are followed to files in the folder itself or, as the Hub's cache has them, in its ``blobs``: a model that
    somebody else made must not pull other files of this machine into a checkpoint. Links to folders are not followed.
    """
    root = source.resolve()
    homes = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    files: dict[str, Path] = {}
    warnings: list[str] = []

    def leave_out(path: Path, why: str) -> None:
        name = str(path.relative_to(root))
        readable = name.isprintable() and len(name) < LONGEST_SHOWN
        warnings.append(f"{source / name if readable else shown(name)}: is not copied: {why}")

    for path in _walk(root, leave_out):
        name = path.relative_to(root).as_posix()
        if _is_weights(path) or name == "config.json":
            continue
        try:
            wrong = _why_not(path, homes)
        except (OSError, RuntimeError) as error:  # until Python 3.12 a RuntimeError, of a link to itself
            too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
            wrong = "its path is too long" if too_long else "it is a link to itself"
        if wrong is None and not is_file_name(name):
            wrong = "no manifest can list its name, which is long or holds something that does not print"
        if wrong is None and "/" in name and name.partition("/")[0] in _OWN:
            wrong = "the checkpoint has a file where this has a folder"
        if wrong is None and name == SOURCE_CARD and (root / CARD_NAME).is_file():
            wrong = f"the source's {CARD_NAME} gets this name"
        if wrong is None:
            files[SOURCE_CARD if name == CARD_NAME else name] = path.resolve()
        else:
            leave_out(path, wrong)
    return Companions(files, warnings)


def _why_not(path: Path, homes: Sequence[Path]) -> str | None:
    """Return why a path of a model folder is not copied; None for a file that is.

    Raises:
        OSError, RuntimeError: its name is too long, or it is a link to itself.
    """
    real = path.resolve()
    if path.is_symlink() and not any(home in real.parents for home in homes):
        return f"it is a link to {real}, which is not in the model folder"
    if path.is_symlink() and real.is_dir():
        return "it is a link to a folder"
    if not real.exists():
        return f"it leads to {real.name}, which is not there; is the model complete?"
    return None if real.is_file() else "it is a pipe, a socket or a device"


def check_objects(companions: Companions) -> None:
    """Refuse a file of settings that holds no JSON object, which no server could read, and one that cannot be read.

    Raises:
        ConversionError, ShardError: names it.
    """
    for path in companions.files.values():
        if not os.access(path, os.R_OK):
            raise ConversionError(f"{path}: cannot be read: Permission denied; make it readable, or move it away")
    for name in SETTINGS:
        if name in companions.files:
            read_object(companions.files[name])


def _walk(root: Path, leave_out: Callable[[Path, str], None]) -> Iterator[Path]:
    """Yield files and links of a folder and of those in it, in order; nothing hidden, and no compiled code.

    What cannot be looked at is left out.
    """

    def unread(error: OSError) -> None:
        leave_out(Path(error.filename), f"the folder cannot be read: {error.strerror}")

    for folder, inner, names in os.walk(root, onerror=unread):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "__pycache__")
        links = [name for name in inner if os.path.islink(os.path.join(folder, name))]  # also where a path is too long
        for name in sorted((*names, *links)):
            if not name.startswith("."):
                yield Path(folder) / name


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in _WEIGHTS or path.name.endswith(".index.json")
