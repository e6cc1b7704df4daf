"""A model of the Hub as a folder: what it consists of, whether the disk has room for it, and its download.

It lies in the Hub's cache, as for every other program, and is not downloaded twice. The token, the cache's place, the
mirror and the offline mode are the library's (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import tqdm

from vllm_milo.values import size_text

from ..errors import ConversionError
from ..hub_names import ModelName
from ..planning.disk import free_bytes
from .background import each, in_background
from .failures import one_line
from .files import fetch
from .listing import NOT_WANTED, SETTINGS, WEIGHTS, Listing
from .patience import Patience

THREADS = 8
"""In which files, or their headers, come."""


def is_offline() -> bool:
    """Return whether the user forbids to ask the Hub."""
    return constants.is_offline_mode()


def download(listing: Listing) -> Path:
    """Download what is not in the cache yet, and compare weights with the Hub's SHA-256, unchanged ones once.

    Returns:
        The folder.

    Raises:
        ConversionError: the disk has no room for it, the download fails, nothing comes for minutes, or weights are
            damaged.
    """
    _refuse_what_does_not_fit(listing)
    if missing := listing.missing_bytes:
        print(f"{listing.name}: downloading {size_text(missing)} to {constants.HF_HUB_CACHE}", file=sys.stderr)
    folder = _fetch(listing, list(listing.sizes), missing)
    _note_revision(listing, next(iter(listing.sizes)))
    return folder


def download_settings(listing: Listing) -> Path:
    """Download all but the weights; return the folder.

    Raises:
        ConversionError: the download fails, or nothing comes for minutes.
    """
    return _fetch(listing, [name for name in listing.sizes if name not in listing.shards], 0)


def cached(name: ModelName) -> Path:
    """Return the folder of a model that is in the cache as a whole, without asking the Hub.

    Raises:
        ConversionError: it is not.
    """
    wanted, unwanted = [WEIGHTS, *SETTINGS], list(NOT_WANTED)
    with one_line(str(name)):
        found = snapshot_download(
            name.repository, revision=name.revision, allow_patterns=wanted, ignore_patterns=unwanted
        )
    folder = Path(found)
    if not list(folder.glob(WEIGHTS)):
        raise ConversionError(f"{name}: the Hub's cache holds no weights of it ({folder}), and HF_HUB_OFFLINE is set")
    return folder


def _fetch(listing: Listing, names: Sequence[str], shown_bytes: int) -> Path:
    """Let files come into the cache, many at once; return the folder that they are in.

    Args:
        listing: of the model.
        names: of the files.
        shown_bytes: that are expected, for a bar on stderr; none is shown for 0.
    """
    patience = Patience(str(listing.name), listing.cache_folder)
    lock = threading.Lock()
    with tqdm(total=shown_bytes, unit="B", unit_scale=True, disable=True if not shown_bytes else None) as bar:

        def arrived(count: int) -> None:
            patience.note()
            with lock:
                bar.update(count)

        def do(name: str, ended: threading.Event) -> Path:
            return fetch(listing, name, ended, arrived)

        paths = list(each(names, do, THREADS, patience))
    return paths[0].parents[names[0].count("/")]


def _note_revision(listing: Listing, name: str) -> None:
    """Let the cache know what the revision means, for when the Hub is not there: a file is asked for by it."""
    ask = partial(hf_hub_download, listing.name.repository, name, revision=listing.name.revision)
    with one_line(str(listing.name)):
        in_background(ask, Patience(str(listing.name)))


def _refuse_what_does_not_fit(listing: Listing) -> None:
    """Refuse a download that the cache's file system has no room for, before a byte of it is there."""
    need, free = listing.missing_bytes, free_bytes(Path(constants.HF_HUB_CACHE))
    if free is not None and need > free:
        raise ConversionError(
            f"{listing.name}: the download takes {size_text(need)}, and {size_text(free)} are free in the Hub's cache "
            f"({constants.HF_HUB_CACHE}); free space or set HF_HOME to a folder on another disk"
        )
