"""The shards of a model of the Hub, downloaded one at a time as a conversion uses them, each deleted after that.

Whoever asks for a shard waits for it; the one that will be used next is then downloaded ahead. One is deleted when all
layers that use it are on the disk as parts of the output, so that whatever ends the process, the next one finds the
layer or downloads the shard again. What was in the Hub's cache before is read there, and stays.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from vllm_milo.shards import ShardError, read_header, read_tensors

from ..durable.files import discard
from ..errors import ConversionError, PassingError
from ..planning.disk import size_text
from .download import Listing
from .failures import one_line

PATIENCE = 5.0
"""Seconds that the end of a conversion waits for a download to notice it."""


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
        self._downloads = _Downloads(self._download)

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
        self._uses, self._folder, self._downloads = dict(uses), folder, _Downloads(self._download)
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
        """Return a shard, opened, when it is there.

        Raises:
            PassingError: it cannot be had, the disk is full, or it is not what its header said.
        """
        name = path.name
        with self._lock:
            if name in self._opened:
                return self._opened[name]
            came = None if name in self._cached else self._ask(name)
        file = self._cached[name] if came is None else came.result()
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

    def _download(self, name: str, bar: type[tqdm]) -> Path:
        """Return the file of a shard, downloaded."""
        what, folder = f"{self._listing.name}: {name}", self._folder
        # older versions of the library show a bar of their own, and are not stopped on the way
        quiet: dict[str, Any] = {"tqdm_class": bar} if "tqdm_class" in _PARAMETERS else {}
        try:
            with one_line(what):
                repository, commit = self._listing.name.repository, self._listing.commit
                file = Path(hf_hub_download(repository, name, revision=commit, local_dir=folder, **quiet))
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


_PARAMETERS = inspect.signature(hf_hub_download).parameters


class _Stopped(Exception):
    """A download is not wanted any more."""


class _Downloads:
    """Downloads one after the other, in a thread of their own."""

    def __init__(self, download: Callable[[str, type[tqdm]], Path]) -> None:
        self._download = download
        self._asked: queue.SimpleQueue[tuple[str, Future[Path]] | None] = queue.SimpleQueue()
        self._waiting: list[Future[Path]] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, name: str) -> Future[Path]:
        """Return what will be the file of a shard, when those before it are there."""
        came: Future[Path] = Future()
        with self._lock:
            if self._ended.is_set():
                came.set_exception(PassingError(f"{name}: is not downloaded, since the conversion ends"))
                return came
            self._waiting.append(came)
            self._asked.put((name, came))
            if self._thread is None:
                # a daemon: a library that does not let itself be stopped must not hold up the end of the process
                self._thread = threading.Thread(target=self._work, name="milo-download", daemon=True)
                self._thread.start()
        return came

    def stop(self) -> None:
        """Let nobody wait any more, and the download that runs end soon."""
        with self._lock:
            self._ended.set()
            self._asked.put(None)
            for came in self._waiting:
                came.set_exception(PassingError("a download was stopped, since the conversion ends"))
            self._waiting.clear()

    def close(self) -> None:
        """Stop, and wait a while for the thread."""
        self.stop()
        if self._thread is not None:
            self._thread.join(PATIENCE)

    def _work(self) -> None:
        bar = _silent_bar(self._ended)
        while (asked := self._asked.get()) is not None and not self._ended.is_set():
            name, came = asked
            try:
                file, error = self._download(name, bar), None
            except BaseException as raised:  # it is raised where the shard is wanted
                file, error = None, raised
            with self._lock:
                if came not in self._waiting:
                    continue  # stopped
                self._waiting.remove(came)
                if file is None:
                    came.set_exception(error)
                else:
                    came.set_result(file)


def _silent_bar(ended: threading.Event) -> type[tqdm]:
    """Return a progress bar for the library that shows nothing, and ends a download when the conversion ends."""

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if ended.is_set():
                raise _Stopped
            return super().update(n)

    return Silent
