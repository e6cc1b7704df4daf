"""The shards of a model of the Hub, downloaded one at a time as a conversion uses them, each deleted after that.

Whoever asks for a shard waits for it; the one that will be used next is then downloaded ahead. One is deleted when all
layers that use it are on the disk as parts of the output, so that whatever ends the process, the next one finds the
layer or downloads the shard again. What was in the Hub's cache before is read there, and stays.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_milo.shards import ShardError, read_header, read_tensors
from vllm_milo.values import size_text

from ..durable.files import discard
from ..errors import ConversionError, PassingError
from .background import Background
from .files import fetch, refuse_damaged
from .listing import Listing
from .patience import Patience


class HubShards:
    """The shards of a model at a commit; see :class:`..source.reader.Shards` for what readers call.

    Args:
        listing: what the model consists of.
        headers: a folder that holds its index and the headers of its shards; read at once.
        settings: the folder of all else of the model.

    Raises:
        ShardError: the headers are broken or contradict the index.
    """

    streamed = True

    def __init__(self, listing: Listing, headers: Path, settings: Path) -> None:
        found = read_tensors(headers)
        self.tensors = {name: entry._replace(file=settings / entry.file.name) for name, entry in found.items()}
        self._listing = listing
        self._cached = {name: path for name in listing.shards if (path := listing.cached_path(name)) is not None}
        self._lock = threading.RLock()
        self._uses: dict[str, Sequence[str]] = {}
        self._folder: Path | None = None
        self._came: dict[str, Future[Path]] = {}
        self._opened: dict[str, Any] = {}
        self._downloads = Background(self._download)
        self._patience = Patience(str(listing.name))

    def peak_bytes(self, uses: Mapping[str, Sequence[str]]) -> int:
        """Return the most bytes of shards on the disk at once that are not in the cache.

        While a layer is worked on, the first matrices of the one after it are read, and the next shard comes.
        """
        steps = list(uses.values())
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for number, names in enumerate(steps):
            for name in names:
                first.setdefault(name, number)
                last[name] = number
        order, most = list(first), 0
        for number in range(len(steps)):
            held = [name for name in order if first[name] <= number <= last[name] + 1]
            held += [name for name in order if first[name] > number][:1]
            most = max(most, sum(self._listing.sizes[name] for name in held if name not in self._cached))
        return most

    @contextlib.contextmanager
    def coming(self, uses: Mapping[str, Sequence[str]], folder: Path) -> Iterator[None]:
        """Let the shards that some layers use come into a new folder, which goes with what is left in it at the end.

        Args:
            uses: the shards of each layer, in the order that layers are worked on.
            folder: for them; nothing else may be in it.
        """
        discard(folder)
        self._uses, self._folder, self._downloads = dict(uses), folder, Background(self._download)
        self._patience = Patience(str(self._listing.name), folder)
        missing = [name for name in self._order() if name not in self._cached]
        if missing:
            size = size_text(sum(self._listing.sizes[name] for name in missing))
            shards = f"{len(missing)} shard{'s' if len(missing) > 1 else ''}"
            print(f"{self._listing.name}: downloading {size} in {shards}, each deleted after use", file=sys.stderr)
        try:
            yield
        finally:
            self._downloads.close()
            with self._lock:
                self._uses, self._folder = {}, None
                self._came.clear()
                self._opened.clear()
            discard(folder)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Let nobody wait for a download any more if the context ends by an error or an interrupt."""
        try:
            yield
        except BaseException:
            self._downloads.stop()
            raise

    def shard(self, path: Path) -> Any:
        """Return a shard, opened, when it is there and is what the Hub has.

        Raises:
            PassingError: it cannot be had, nothing comes for minutes, the disk is full, it is damaged, or it is not
                what its header said.
        """
        name = path.name
        with self._lock:
            if name in self._opened:
                return self._opened[name]
            came = None if name in self._cached else self._ask(name)
        if came is None:
            file = self._cached[name]
            refuse_damaged(self._listing, name, file, self._arrived)
        else:
            file = self._patience.wait(came)
        try:
            opened = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise PassingError(f"{file}: cannot be read: {error}; --resume downloads it again") from error
        with self._lock:
            opened = self._opened.setdefault(name, opened)
            self._ask_for_next()
        return opened

    def used(self, layers: Iterable[str]) -> None:
        """Note that some layers need their shards no more; delete those that no other layer needs.

        Raises:
            PassingError: one cannot be deleted.
        """
        with self._lock:
            for layer in layers:
                self._uses.pop(layer, None)
            needed = set(self._order())
            for name in {*self._opened, *self._came} - needed:
                self._opened.pop(name, None)  # who reads it yet has it open, and its room is free when that ends
                if name in self._came and self._came[name].done():
                    self._delete(name, self._came.pop(name))

    def _delete(self, name: str, came: Future[Path]) -> None:
        if came.exception() is not None:
            return
        try:
            came.result().unlink(missing_ok=True)
        except OSError as error:
            raise PassingError(f"{came.result()}: cannot be deleted after its use: {error.strerror}") from error

    def _order(self) -> list[str]:
        """Return the shards that are needed yet, in the order of their first use."""
        return list(dict.fromkeys(name for names in self._uses.values() for name in names))

    def _ask(self, name: str) -> Future[Path]:
        """Return a shard's download, which is begun if it is not; one that failed ahead of its use is tried again."""
        came = self._came.get(name)
        if came is None or (came.done() and came.exception() is not None):
            came = self._came[name] = self._downloads.begin(name)
        return came

    def _ask_for_next(self) -> None:
        """Begin the next shard's download, unless there is one already that nobody has opened yet."""
        if not self._came.keys() - self._opened.keys():
            for name in [name for name in self._order() if name not in self._cached and name not in self._came][:1]:
                self._ask(name)

    def _arrived(self, _: int) -> None:
        self._patience.note()

    def _download(self, name: str, ended: threading.Event) -> Path:
        """Return the file of a shard, downloaded."""
        what, folder = f"{self._listing.name}: {name}", self._folder
        try:
            file = fetch(self._listing, name, ended, self._arrived, folder)
            self._refuse_other_file(what, file, name)
        except (ConversionError, ShardError) as error:
            cause = error.__cause__
            full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
            reason = f"{what}: the disk is full ({folder}); free space or choose another output" if full else error
            raise PassingError(str(reason)) from error
        return file

    def _refuse_other_file(self, what: str, file: Path, name: str) -> None:
        """Refuse a shard whose header is not the one that the conversion was planned by."""
        there = {tensor: entry[1:] for tensor, entry in read_header(file).items()}
        planned = {tensor: entry[1:] for tensor, entry in self.tensors.items() if entry.file.name == name}
        if there != planned:
            raise PassingError(f"{what}: is not the file whose header was read before; try again later")
