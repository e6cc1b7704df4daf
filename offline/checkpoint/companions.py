"""The source's files that come along into a checkpoint: tokenizer, chat templates, remote code, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vllm_milo.shards import read_object

from ..source.foreign import SETTINGS
from .manifest import CARD_NAME

SOURCE_CARD = "README_SOURCE.md"
"""What the source's README.md is called in a checkpoint, whose own README.md is its model card."""

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".tflite", ".ot", ".onnx_data"),
)
"""Ends of the names of weights, which may hold the model in other formats."""


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
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        if _is_weights(path) or name == "config.json":
            continue
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # until Python 3.12 a RuntimeError
            warnings.append(f"{source / name}: is not copied: it is a link to itself")
            continue
        if path.is_symlink() and not any(home in real.parents for home in homes):
            warnings.append(f"{source / name}: is not copied: it is a link to {real}, which is not in the model folder")
        elif path.is_symlink() and real.is_dir():
            warnings.append(f"{source / name}: is not copied: it is a link to a folder")
        elif real.is_file():
            files[SOURCE_CARD if name == CARD_NAME else name] = real
    return Companions(files, warnings)


def check_objects(companions: Companions) -> None:
    """Refuse a file of settings that holds no JSON object: no server could read the checkpoint.

    Raises:
        ShardError: names it.
    """
    for name in SETTINGS:
        if name in companions.files:
            read_object(companions.files[name])


def _walk(root: Path) -> Iterator[Path]:
    """Yield files and links of a folder and of those in it, in order; nothing hidden, and no compiled code."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "__pycache__")
        links = [name for name in inner if (Path(folder) / name).is_symlink()]
        for name in sorted((*names, *links)):
            if not name.startswith("."):
                yield Path(folder) / name


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in _WEIGHTS or path.name.endswith(".index.json")
