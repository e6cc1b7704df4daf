"""Writes a checkpoint folder that appears whole or not at all.

Everything goes into a hidden sibling folder first. config.json and, of all that, the manifest come last, all files are
flushed to disk, and a rename publishes the folder (:meth:`CheckpointWriter.publish`). With a fingerprint, finished
layers survive whatever ends the process (:mod:`..durable.journal`), and another writer goes on with them; without one,
or before the first layer is finished, a failure or Ctrl-C removes the hidden folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError

from vllm_milo.shards import INDEX_NAME

from ..durable.files import FileEntry, describe_file, discard, flush, save_tensors, write_json
from ..durable.journal import Journal, ShardRecord, check_file, shard_name
from ..durable.publication import SEALED, publish
from ..durable.signals import deferred_signals
from ..durable.worker import Worker
from ..errors import ConversionError, PassingError
from .claim import Claim
from .companions import find_companions
from .manifest import MANIFEST_NAME, describe_folder
from .output import refuse_unsafe_output

SHARD_BYTES = 4 * 2**30


class CheckpointWriter:
    """A context manager: ``add`` tensors or ``keep`` layers, ``seal``, ``publish``.

    Args:
        out: the checkpoint folder; see :func:`.output.refuse_unsafe_output` for what it may be.
        source: the model folder that is converted.
        overwrite: replace an existing MiLo checkpoint, once the new one is whole.
        shard_bytes: start a new shard beyond this size.
        claim: of ``out``; without one, the writer makes its own.
        fingerprint: what decides the result, so that finished layers can be kept; see :mod:`..fingerprint`.
        layers: how many have matrices to quantize.
        final: whether layers are what will be in the shards; False if they change after the last.
        kept: is told, in another thread, the names of layers that :meth:`keep` has put on the disk.

    Raises:
        ConversionError: ``out`` is not safe to write, cannot be written, or holds damaged layers.
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        claim: Claim | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        layers: int = 0,
        final: bool = True,
        kept: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.out = out.resolve()
        self.source = source
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self.bytes_written = 0
        self._claim = claim or Claim(out, source, overwrite)
        self._owned = claim is None
        self._fingerprint, self._layers, self._final, self._kept = fingerprint, layers, final, kept
        self._stored: set[str] = set()
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[ShardRecord] = []
        self._resumed = False
        self._worker, self._shard_worker = Worker(), Worker()
        self._exit = ExitStack()

    @property
    def journal(self) -> Journal:
        """Return the finished layers."""
        return self._claim.journal

    @property
    def folder(self) -> Path:
        """Return where the checkpoint is until it is published."""
        return self.journal.checkpoint

    def __enter__(self) -> CheckpointWriter:
        if self._owned:
            self._exit.enter_context(self._claim)
        with ExitStack() as failing:
            failing.push(self.__exit__)
            self._found = _identity(self.out)
            try:
                self._begin()
            except OSError as error:
                raise self._cannot_write(error) from error
            failing.pop_all()
        return self

    def _begin(self) -> None:
        """Go on with the layers that are there, or begin a new folder."""
        if self._claim.published:
            return
        if self._claim.resume and self.journal.quantized:
            self._resumed = True
            self._restore()
            return
        discard(self.journal.folder)
        self._claim.journal = Journal(self.journal.folder)
        self.journal.begin(self._fingerprint or {}, self._layers)

    def _restore(self) -> None:
        """Take the shards that are complete, and the tensors of finished layers that are in none of them."""
        named = {number: path for path in self.folder.iterdir() if (number := _shard_number(path.name))}
        for number, shard in enumerate(self.journal.shards, start=1):
            path = named.get(number, self.folder / shard_name(number))
            check_file(path, shard.entry)
            path.rename(self.folder / shard_name(number))  # it had its last name where a kill came after sealing
            self._shards.append(shard)
            self._stored.update(shard.names)
            self.bytes_written += shard.bytes
        known = {shard_name(number + 1) for number in range(len(self._shards))}
        for path in self.folder.iterdir():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.journal.forget()
        discard(self.journal.source)
        if self._final:
            for record in self.journal.records:
                for name, tensor in self.journal.tensors(record, without=self._stored).items():
                    self.add(name, tensor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the hidden folder, but not where finished layers in it are of use to a conversion that goes on.

        Layers that were handed over are finished first, and signals wait for that.
        """
        try:
            with deferred_signals():
                self._worker.close()
                self._shard_worker.close()
                self._keep_or_delete(error)
        finally:
            self._exit.close()

    def _keep_or_delete(self, error: BaseException | None) -> None:
        # what fails by the input fails again; but what another process has made is not for this one to delete
        hopeless = isinstance(error, ConversionError) and not isinstance(error, PassingError) and not self._resumed
        if self._claim.published or hopeless or not self.journal.quantized:
            discard(self.journal.folder)
        elif error is not None:
            for worker in (self._worker, self._shard_worker):
                if worker.error not in (None, error):
                    error.add_note(str(worker.error))
            error.add_note(
                f"{self.journal.progress} are kept in {self.journal.folder}; go on with the same command and --resume"
            )

    def keep(
        self,
        layers: Sequence[str],
        tensors: Mapping[str, torch.Tensor],
        ranks: Mapping[str, int],
        said: Mapping[str, Any],
    ) -> None:
        """Take finished layers, which are put on the disk while the next ones are computed. See :meth:`.Journal.keep`.

        At most one such set of layers waits beside the one that is being written; both are on the CPU, so that they
        take host memory alone. A kill loses these two at most. After :meth:`wait` all are on the disk. Shards are made
        of the layers' files in yet another thread, since hashing their bytes takes as long again.

        Raises:
            ConversionError: the disk is full or the folder cannot be written, by layers before these.
        """
        held = {name: on_host(tensor) for name, tensor in tensors.items()}
        self._worker.hand_over(partial(self._keep, layers, held, ranks, said))

    def wait(self) -> None:
        """Return when all layers that were given to :meth:`keep` are on the disk.

        Raises:
            ConversionError: the disk is full or the folder cannot be written.
        """
        self._worker.wait()

    def _keep(
        self,
        layers: Sequence[str],
        held: Mapping[str, torch.Tensor],
        ranks: Mapping[str, int],
        said: Mapping[str, Any],
    ) -> None:
        try:
            written = self.journal.keep(layers, held, ranks, said)
        except (OSError, SafetensorError) as error:
            raise self._cannot_write(error, sum(tensor.nbytes for tensor in held.values())) from error
        if self._kept is not None:
            self._kept(layers)
        if self._final:
            for name, tensor in written.items():
                self.add(name, tensor)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; a full shard goes to the disk while the next one fills."""
        tensor = on_host(tensor)
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._write_shard()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def seal(self, config: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Write the index, the source's other files, ``extra`` JSON files, config.json and, last, the manifest.

        Raises:
            ConversionError: the disk is full or the folder cannot be written.
        """
        self.wait()
        self._write_shard()
        self._shard_worker.wait()
        try:
            shards = self._name_shards()
            find_companions(self.source).copy(self.folder)
            for name, content in extra.items():
                _write_json(self.folder / name, content)
            _write_json(self.folder / "config.json", config)
            _write_json(self.folder / MANIFEST_NAME, describe_folder(self.folder, shards))
            _sync(self.folder)
        except OSError as error:
            raise self._cannot_write(error) from error

    def publish(self) -> Path:
        """Make the sealed folder appear as ``out``; return where it is.

        See :func:`..durable.publication.publish` for what a kill leaves. What was at ``out`` at the start is looked at
        once more. If something else stands there now, that is kept and the checkpoint appears beside it under another
        name. Signals wait until it is done.

        Raises:
            ConversionError: the folder cannot be renamed.
        """
        with deferred_signals():
            try:
                target = self.out
                if _identity(self.out) != self._found or not self._may_replace():
                    target = _free_name(self.out)
                sealed = {"target": target.name, "manifest": describe_file(self.folder / MANIFEST_NAME).sha256}
                write_json(self.journal.folder / SEALED, sealed)
                publish(self.folder, target, self._claim.replaced)
                self._claim.published = target
                discard(self._claim.replaced)
            except OSError as error:
                raise self._cannot_write(error) from error
        return target

    def _may_replace(self) -> bool:
        try:
            refuse_unsafe_output(self.out, self.source, self.overwrite)
        except ConversionError:
            return False
        return True

    def _write_shard(self) -> None:
        """Let what was taken become a shard, when the one before is on the disk: no more than two are in memory."""
        if not self._pending:
            return
        self._shard_worker.wait()
        self._shard_worker.hand_over(partial(self._store_shard, self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _store_shard(self, tensors: Mapping[str, torch.Tensor]) -> None:
        path = self.folder / shard_name(len(self._shards) + 1)
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            entry = self._shard_of_one_layer(list(tensors), path)
            if entry is None:
                save_tensors(path, tensors)
                entry = describe_file(path)  # while the system still has it in memory
            shard = ShardRecord(list(tensors), size, entry)
            if self.journal.records and self._final:
                flush(path)
                self.journal.keep_shard(shard)
        except (OSError, SafetensorError) as error:
            raise self._cannot_write(error, size) from error
        self._shards.append(shard)
        self.bytes_written += size

    def _shard_of_one_layer(self, names: Sequence[str], path: Path) -> FileEntry | None:
        """Let a layer's file become the shard if it holds the same tensors, and so the same bytes; else return None."""
        for record in reversed(self.journal.records if self._final else []):
            if record.tensors == names and self.journal.link(record, path):
                return record.file
        return None

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds that threads wrote so far, and those that finished layers waited for them."""
        writing = self._worker.busy + self._shard_worker.busy
        return {"writing": writing, "waiting_for_the_disk": self._worker.waited}

    def _name_shards(self) -> dict[str, FileEntry]:
        """Give the shards their final names, now that their number is known, and index them; return them by name."""
        weight_map: dict[str, str] = {}
        named: dict[str, FileEntry] = {}
        for number, shard in enumerate(self._shards, start=1):
            final = shard_name(number, len(self._shards))
            (self.folder / shard_name(number)).rename(self.folder / final)
            weight_map |= dict.fromkeys(shard.names, final)
            named[final] = shard.entry
        index = {"metadata": {"total_size": self.bytes_written}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.folder / INDEX_NAME, index)
        return named

    def _cannot_write(self, error: Exception, size: int = 0) -> PassingError:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
            free = shutil.disk_usage(self.out.parent).free
            needed = f", the next file takes {size / 2**20:.1f}" if size else ""
            left = "free space" if self.journal.quantized else "nothing was left behind, free space"
            return PassingError(
                f"{self.out}: the disk is full ({free / 2**20:.1f} MiB free{needed}); {left} or choose another output"
            )
        return PassingError(f"{self.out}: cannot be written: {text}")


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU that has its memory for itself."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        tensor = tensor.clone()  # a view would keep its whole batch in memory until the shard is full
    return tensor


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder or link from another at the same path; None where there is none."""
    try:
        status = folder.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _free_name(folder: Path) -> Path:
    """Return the path of a sibling that does not exist: ``NAME-2``, ``NAME-3``, …"""
    number = 2
    while os.path.lexists(sibling := folder.with_name(f"{folder.name}-{number}")):
        number += 1
    return sibling


def _shard_number(name: str) -> int:
    """Return the number of a shard by its name, final or not; 0 for another file."""
    found = re.fullmatch(r"model-(\d{5})(-of-\d{5})?\.safetensors", name)
    return int(found[1]) if found else 0


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Flush every file and folder: after the rename nothing of the checkpoint may be only in memory."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)
