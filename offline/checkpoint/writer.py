"""Writes a checkpoint folder that appears whole or not at all.

Everything goes into a hidden sibling folder first. config.json and, of all that, the manifest come last, all files are
flushed to disk, and a rename publishes the folder (:meth:`CheckpointWriter.publish`). A failure or Ctrl-C removes it. A
killed process leaves a hidden ``.partial`` folder; in it is a config.json only if the checkpoint was whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_milo.shards import INDEX_NAME

from ..errors import ConversionError
from .companions import find_companions
from .manifest import MANIFEST_NAME, FileEntry, describe_file, describe_folder
from .output import refuse_unsafe_output

SHARD_BYTES = 4 * 2**30


class _Shard(NamedTuple):
    """A shard on the disk: the names of its tensors, and its size and sha256."""

    names: list[str]
    entry: FileEntry


class CheckpointWriter:
    """A context manager: ``add`` tensors, ``seal``, ``publish``; leaving it before that removes everything.

    Args:
        out: the checkpoint folder; see :func:`.output.refuse_unsafe_output` for what it may be.
        source: the model folder that is converted.
        overwrite: replace an existing MiLo checkpoint, once the new one is whole.
        shard_bytes: start a new shard beyond this size.

    Raises:
        ConversionError: ``out`` is not safe to write, or cannot be written.
    """

    def __init__(self, out: Path, source: Path, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = out.resolve()
        self.source = source
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self.bytes_written = 0
        self.partial = self.out.parent / f".{self.out.name}.partial-{os.getpid()}"
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[_Shard] = []

    def __enter__(self) -> CheckpointWriter:
        refuse_unsafe_output(self.out, self.source, self.overwrite)
        self._found = _identity(self.out)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
        except OSError as error:
            raise self._cannot_write(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; full shards go to disk at once."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a view would keep its whole batch in memory until the shard is full
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._write_shard()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def seal(self, config: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Write the index, the source's other files, ``extra`` JSON files, config.json and, last, the manifest.

        Raises:
            ConversionError: the disk is full or the folder cannot be written.
        """
        self._write_shard()
        try:
            shards = self._name_shards()
            find_companions(self.source).copy(self.partial)
            for name, content in extra.items():
                _write_json(self.partial / name, content)
            _write_json(self.partial / "config.json", config)
            _write_json(self.partial / MANIFEST_NAME, describe_folder(self.partial, shards))
            _sync(self.partial)
        except OSError as error:
            raise self._cannot_write(error) from error

    def publish(self) -> Path:
        """Make the sealed folder appear as ``out`` in one rename; return where it is.

        With ``overwrite`` there is one rename before it, of what stands there now, to a hidden ``.replaced`` folder,
        which goes last. A kill between the two leaves that folder, and no ``out``.

        What was at ``out`` at the start is looked at once more. If something else stands there now, that is kept and
        the checkpoint appears beside it under another name. If the rename fails, what was there comes back.

        Raises:
            ConversionError: the folder cannot be renamed.
        """
        target = self.out
        if _identity(self.out) != self._found or not self._may_replace():
            target = _free_name(self.out)
        replaced = self.partial.with_name(self.partial.name + ".replaced")
        try:
            if target.exists():
                target.rename(replaced)
            try:
                self.partial.rename(target)
            except BaseException:
                if replaced.exists():
                    replaced.rename(target)
                raise
        except OSError as error:
            raise self._cannot_write(error) from error
        _flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return target

    def _may_replace(self) -> bool:
        try:
            refuse_unsafe_output(self.out, self.source, self.overwrite)
        except ConversionError:
            return False
        return True

    def _write_shard(self) -> None:
        if not self._pending:
            return
        path = self.partial / _shard_name(len(self._shards) + 1)
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
            entry = describe_file(path)  # while the system still has it in memory
        except (OSError, SafetensorError) as error:
            raise self._cannot_write(error) from error
        self._shards.append(_Shard(list(self._pending), entry))
        self.bytes_written += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> dict[str, FileEntry]:
        """Give the shards their final names, now that their number is known, and index them; return them by name."""
        weight_map: dict[str, str] = {}
        named: dict[str, FileEntry] = {}
        for number, shard in enumerate(self._shards, start=1):
            final = _shard_name(number, len(self._shards))
            (self.partial / _shard_name(number)).rename(self.partial / final)
            weight_map |= dict.fromkeys(shard.names, final)
            named[final] = shard.entry
        index = {"metadata": {"total_size": self.bytes_written}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.partial / INDEX_NAME, index)
        return named

    def _cannot_write(self, error: Exception) -> ConversionError:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
            free = shutil.disk_usage(self.out.parent).free
            return ConversionError(
                f"{self.out}: the disk is full ({free / 2**20:.0f} MiB free); nothing was left behind, "
                f"free space or choose another output"
            )
        return ConversionError(f"{self.out}: cannot be written: {text}")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another at the same path; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _free_name(folder: Path) -> Path:
    """Return the path of a sibling that does not exist: ``NAME-2``, ``NAME-3``, …"""
    number = 2
    while (sibling := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return sibling


def _shard_name(number: int, total: int | None = None) -> str:
    return f"model-{number:05d}" + (f"-of-{total:05d}" if total else "") + ".safetensors"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Flush every file and folder: after the rename nothing of the checkpoint may be only in memory."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
