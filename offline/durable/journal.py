"""The finished layers of a conversion on the disk, from which another process can go on.

    .NAME.partial/
        journal.json                 what decides the conversion (its fingerprint); written first
        layers/00003.safetensors     what layer or layers solved together became, as checkpoint tensors
        layers/00003.json            their record; written after that: without it the file does not count
        shards/00001.json            the names, size and sha256 of a shard of the checkpoint that is complete
        checkpoint/                  the checkpoint as it will be published, with its shards
        source/                      shards of a source that is downloaded as it is used, while they are
        sealed.json                  where it is published and the sha256 of its manifest; written before that

Every file is written beside its name, flushed and renamed, so after a kill or a power cut each is whole or absent.
Shards hold tensors of several layers in an order of their own, so a layer is written twice: into its file when it is
done, and into its shard when that is full. A layer's file is deleted as soon as its shards are complete, so the disk
holds no more than one shard and one layer twice. A layer that is a shard by itself is written once. Hidden states are
not kept: they would be gigabytes after each layer, and what goes on can make them anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ..errors import ConversionError
from .files import FileEntry, describe_file, flush, write_json, write_tensors

VERSION = 1
JOURNAL_NAME = "journal.json"
START_OVER = "start over with --overwrite and without --resume"


class LayerRecord(NamedTuple):
    """What is known of layers that were solved together.

    Attributes:
        number: of the record, from 0.
        layers: their names.
        tensors: names of their checkpoint tensors, in the order that they are written to shards in.
        file: size and sha256 of the file that holds them.
        ranks: of their matrices, by name.
        said: what the report says of them, as JSON.
    """

    number: int
    layers: list[str]
    tensors: list[str]
    file: FileEntry
    ranks: dict[str, int]
    said: dict[str, Any]


class ShardRecord(NamedTuple):
    """A complete shard: the names of its tensors, their bytes, and the size and sha256 of the file."""

    names: list[str]
    bytes: int
    entry: FileEntry


class Journal:
    """The journal in a folder, which exists after :meth:`begin`.

    Args:
        folder: of the journal, existing or not.

    Attributes:
        records: of finished layers, in order.
        shards: complete ones, in order.
        total: layers of the model that have matrices to quantize.
        fingerprint: what decides the conversion; None before :meth:`begin`, or if :meth:`read` found no journal.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._layers, self._shards = folder / "layers", folder / "shards"
        self.checkpoint, self.source = folder / "checkpoint", folder / "source"
        self.records: list[LayerRecord] = []
        self.shards: list[ShardRecord] = []
        self.total = 0
        self.fingerprint: dict[str, Any] | None = None

    def begin(self, fingerprint: Mapping[str, Any], total: int) -> None:
        """Make a new journal of a conversion that quantizes so many layers.

        Raises:
            OSError: it cannot be written.
        """
        for folder in (self.folder, self._layers, self._shards, self.checkpoint):
            folder.mkdir()
        content = {"version": VERSION, "layers": total, "fingerprint": fingerprint}
        write_json(self.folder / JOURNAL_NAME, content)
        self.total, self.fingerprint = total, dict(fingerprint)

    def read(self) -> None:
        """Read what is on the disk.

        Raises:
            ConversionError: it is of another version, or damaged.
        """
        path = self.folder / JOURNAL_NAME
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ConversionError(f"{path}: is of another version of vllm-milo; {START_OVER}")
            while (record := self._layers / f"{len(self.records):05d}.json").exists():
                self.records.append(_read_layer(len(self.records), json.loads(record.read_text(encoding="utf-8"))))
            while (record := self._shards / f"{len(self.shards) + 1:05d}.json").exists():
                found = json.loads(record.read_text(encoding="utf-8"))
                self.shards.append(ShardRecord(found["names"], found["bytes"], FileEntry(*found["file"])))
            self.total, self.fingerprint = content["layers"], content["fingerprint"]
            if not isinstance(self.total, int) or not isinstance(self.fingerprint, dict):
                raise ValueError(f"{JOURNAL_NAME} does not say what decided them")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"{self.folder}: its records cannot be read ({error}); {START_OVER}") from error

    @property
    def layers(self) -> int:
        """Return how many layers are finished, those without matrices among them."""
        return sum(len(record.layers) for record in self.records)

    @property
    def quantized(self) -> int:
        """Return how many finished layers have quantized matrices: what it would take time to do again."""
        return sum(
            any(matrix.startswith(f"{layer}.") for matrix in record.ranks)
            for record in self.records
            for layer in record.layers
        )

    @property
    def progress(self) -> str:
        """Return how many layers are quantized, as text."""
        return f"{self.quantized} of {self.total} layers"

    def keep(
        self,
        layers: Sequence[str],
        tensors: Mapping[str, torch.Tensor],
        ranks: Mapping[str, int],
        said: Mapping[str, Any],
    ) -> dict[str, torch.Tensor]:
        """Put finished layers on the disk; when this returns, they survive.

        Args:
            layers: their names.
            tensors: of the checkpoint, on the CPU, by name, in the order of the shards.
            ranks: of their matrices.
            said: what the report says of them.

        Returns:
            The tensors as they lie in the file, which take no memory of this process.

        Raises:
            OSError, SafetensorError: the disk is full, or the folder cannot be written.
        """
        number = len(self.records)
        file = write_tensors(self._layer(number), tensors)
        record = LayerRecord(number, list(layers), list(tensors), file, dict(ranks), dict(said))
        write_json(self._layers / f"{number:05d}.json", record._asdict())
        self.records.append(record)
        found = _read(self._layer(number), record.tensors)
        return {name: found[name] for name in record.tensors}

    def tensors(self, record: LayerRecord, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Return the tensors of finished layers, in order, on the CPU, without those that are not wanted.

        They are read from the layers' file or, where that is no longer needed, from shards.

        Raises:
            ConversionError: their file is damaged; those of shards are not looked at.
        """
        names = [name for name in record.tensors if name not in without]
        found: dict[str, torch.Tensor] = {}
        for number, shard in enumerate(self.shards, start=1):
            if wanted := set(names).intersection(shard.names):
                found |= _read(self.checkpoint / shard_name(number), wanted)
        if missing := set(names) - found.keys():
            check_file(self._layer(record.number), record.file)
            found |= _read(self._layer(record.number), missing)
        return {name: found[name] for name in names}

    def link(self, record: LayerRecord, path: Path) -> bool:
        """Give the file of finished layers a second name, which stays when :meth:`forget` takes the first.

        Returns:
            Whether that was done; False where the file system cannot, or the file is gone.
        """
        try:
            os.link(self._layer(record.number), path)
        except OSError:
            return False
        return True

    def keep_shard(self, shard: ShardRecord) -> None:
        """Note that a shard is complete and on the disk, and delete the layers' files that are no longer needed.

        Raises:
            OSError: the folder cannot be written.
        """
        flush(self.checkpoint)
        self.shards.append(shard)
        content = {"names": shard.names, "bytes": shard.bytes, "file": shard.entry}
        write_json(self._shards / f"{len(self.shards):05d}.json", content)
        self.forget()

    def forget(self) -> None:
        """Delete the files of layers that are in complete shards as a whole."""
        held = {name for shard in self.shards for name in shard.names}
        for record in self.records:
            if held.issuperset(record.tensors):
                self._layer(record.number).unlink(missing_ok=True)

    def _layer(self, number: int) -> Path:
        return self._layers / f"{number:05d}.safetensors"


def shard_name(number: int, total: int | None = None) -> str:
    """Return the name of a shard, counted from 1, before and after the number of all of them is known."""
    return f"model-{number:05d}" + (f"-of-{total:05d}" if total else "") + ".safetensors"


def _read(path: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _read_layer(number: int, found: Mapping[str, Any]) -> LayerRecord:
    record = LayerRecord(**{**found, "number": number, "file": FileEntry(*found["file"])})
    kinds = (list, list, dict, dict)
    if not all(map(isinstance, (record.layers, record.tensors, record.ranks, record.said), kinds)):
        raise ValueError(f"that of layer {number} is none")
    return record


def check_file(path: Path, expected: FileEntry) -> None:
    """Raise ConversionError where a file is not what its record says."""
    try:
        found = describe_file(path)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror}); {START_OVER}") from error
    if found != expected:
        raise ConversionError(f"{path}: is damaged, its size or sha256 is not that of its record; {START_OVER}")
