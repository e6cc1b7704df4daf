"""A file of the Hub, downloaded and compared with the SHA-256 that the Hub says of it, again where it changed."""

from __future__ import annotations

import hashlib
import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from tqdm import tqdm

from ..errors import PassingError
from .failures import one_line
from .listing import Listing
from .verified import is_verified, note_verified, state_of

BUFFER = 2**23
_PARAMETERS = inspect.signature(hf_hub_download).parameters

Arrived = Callable[[int], None]
"""Is told of bytes that came; of 0 where a file is only read."""


class _Stopped(Exception):
    """A download is not wanted any more."""


def fetch(
    listing: Listing,
    name: str,
    ended: threading.Event,
    arrived: Arrived,
    folder: Path | None = None,
) -> Path:
    """Download a file, unless the cache has it, and compare it with the Hub's SHA-256 of it.

    What comes damaged is downloaded once more. What was in the cache before is another program's, and is left there.

    Args:
        listing: of the model.
        name: of the file.
        ended: when set, the download ends soon.
        arrived: see :data:`Arrived`.
        folder: for the file, in place of the Hub's cache.

    Raises:
        ConversionError: it cannot be had.
        PassingError: it came damaged twice, or what was in the cache before is damaged.
    """
    what = f"{listing.name}: {name}"
    held = listing.cached_path(name) if folder is None else None
    path = _download(listing, name, ended, arrived, folder, again=False)
    if held is not None:
        refuse_damaged(listing, name, path, arrived)
        return path
    found = _sha256(listing, name, path, arrived)
    if found is None:
        return path
    print(f"{what}: came damaged (its SHA-256 is {found}); downloading it again", file=sys.stderr)
    path = _download(listing, name, ended, arrived, folder, again=True)
    found = _sha256(listing, name, path, arrived)
    if found is not None:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise PassingError(
            f"{what}: came damaged twice: its SHA-256 is {found}, and the Hub says {listing.sha256[name]}; it was "
            f"deleted. Is a proxy or a mirror in between, or are disk or memory broken? Try again later"
        )
    return path


def refuse_damaged(listing: Listing, name: str, path: Path, arrived: Arrived) -> None:
    """Refuse a file of the cache that is not what the Hub has.

    Raises:
        PassingError: it is not; names the files to delete.
    """
    found = _sha256(listing, name, path, arrived)
    if found is not None:
        places = " and ".join(dict.fromkeys([str(path), str(path.resolve())]))
        raise PassingError(
            f"{listing.name}: {name} in the Hub's cache is damaged: its SHA-256 is {found}, and the Hub says "
            f"{listing.sha256[name]}; delete {places}, and it is downloaded again"
        )


def _sha256(listing: Listing, name: str, path: Path, arrived: Arrived) -> str | None:
    """Return the SHA-256 of a file where it is another than the Hub says, None where it is the same or not known.

    A file of the cache that was found to be the same before, and did not change, is not read again.
    """
    said = listing.sha256.get(name)
    if said is None:
        return None
    model = listing.cache_folder
    is_cached = model in path.parents
    try:
        before = state_of(path)
        if is_cached and is_verified(model, said, before):
            return None
        found = _read(path, arrived)
        is_unchanged = state_of(path) == before  # while it was read
    except OSError as error:
        raise PassingError(f"{path}: cannot be read: {error.strerror}") from error
    if found != said:
        return found
    if is_cached and is_unchanged:
        note_verified(model, said, before)
    return None


def _read(path: Path, arrived: Arrived) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(BUFFER)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            arrived(0)
    return digest.hexdigest()


def _download(
    listing: Listing,
    name: str,
    ended: threading.Event,
    arrived: Arrived,
    folder: Path | None,
    again: bool,
) -> Path:
    # older versions of the library show a bar of their own, and are not stopped on the way
    quiet: dict[str, Any] = {"tqdm_class": _silent_bar(ended, arrived)} if "tqdm_class" in _PARAMETERS else {}
    with one_line(f"{listing.name}: {name}" if folder is not None else str(listing.name)):
        return Path(
            hf_hub_download(
                listing.name.repository,
                name,
                revision=listing.commit,
                local_dir=folder,
                force_download=again,
                **quiet,
            )
        )


def _silent_bar(ended: threading.Event, arrived: Arrived) -> type[tqdm]:
    """Return a progress bar for the library that shows nothing, and ends a download when nobody wants it any more."""

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if ended.is_set():
                raise _Stopped
            arrived(int(n or 0))
            return super().update(n)

    return Silent
