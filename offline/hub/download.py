"""A model of the Hub as a folder: what it consists of, whether the disk has room for it, and its download.

It lies in the Hub's cache, as for every other program, and is not downloaded twice. The token, the cache's place, the
mirror and the offline mode are the library's (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

from ..errors import ConversionError
from ..hub_names import ModelName
from ..planning.disk import free_bytes, size_text
from .failures import one_line

WEIGHTS = "*.safetensors"
SETTINGS = (
    *("*.json", "*.jinja", "*.py", "*.txt", "*.md", "*.model", "*.tiktoken"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""All that is taken beside weights: configuration, tokenizers, chat templates, remote code, licences."""
_NOT = ("*/*.safetensors", "consolidated*.safetensors")
"""The same weights once more, in the form of the model's makers; what is read lies at the top."""


class Listing(NamedTuple):
    """A model of the Hub at one commit: the sizes of the files that are wanted, by name."""

    name: ModelName
    commit: str
    sizes: dict[str, int]

    @property
    def shards(self) -> list[str]:
        """Return the names of the files that hold weights."""
        return sorted(name for name in self.sizes if fnmatchcase(name, WEIGHTS))

    @property
    def missing_bytes(self) -> int:
        """Return the bytes that are not in the cache yet."""
        return sum(size for name, size in self.sizes.items() if self.cached_path(name) is None)

    def cached_path(self, name: str) -> Path | None:
        """Return where a file is in the cache; None where it is not."""
        path = try_to_load_from_cache(self.name.repository, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None


def is_offline() -> bool:
    """Return whether the user forbids to ask the Hub."""
    return constants.is_offline_mode()


def look_up(name: ModelName) -> Listing:
    """Ask the Hub what a model consists of; nothing is downloaded.

    Raises:
        ConversionError: there is no such model or revision, it may not be read, the Hub cannot be reached, or the
            model has no safetensors files.
    """
    with one_line(str(name)):
        info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _is_wanted(file.rfilename)}
        listing = Listing(name, str(info.sha), sizes)
    if not listing.shards:
        raise ConversionError(
            f"{name}: the model on the Hugging Face Hub has no *.safetensors file at its top; other weight formats are "
            f"not read"
        )
    return listing


def download(listing: Listing) -> Path:
    """Download what is not in the cache yet; return the folder.

    Raises:
        ConversionError: the disk has no room for it, or the download fails.
    """
    _refuse_what_does_not_fit(listing)
    if missing := listing.missing_bytes:
        print(f"{listing.name}: downloading {size_text(missing)} to {constants.HF_HUB_CACHE}", file=sys.stderr)
    # by the revision, not the commit: the cache then knows what the revision means when the Hub is not there
    return _snapshot(listing.name, listing.name.revision, (WEIGHTS, *SETTINGS))


def download_settings(listing: Listing) -> Path:
    """Download all but the weights; return the folder.

    Raises:
        ConversionError: the download fails.
    """
    return _snapshot(listing.name, listing.commit, SETTINGS)


def cached(name: ModelName) -> Path:
    """Return the folder of a model that is in the cache as a whole, without asking the Hub.

    Raises:
        ConversionError: it is not.
    """
    folder = _snapshot(name, name.revision, (WEIGHTS, *SETTINGS))
    if not list(folder.glob(WEIGHTS)):
        raise ConversionError(f"{name}: the Hub's cache holds no weights of it ({folder}), and HF_HUB_OFFLINE is set")
    return folder


def _snapshot(name: ModelName, revision: str | None, patterns: tuple[str, ...]) -> Path:
    with one_line(str(name)):
        folder = snapshot_download(
            name.repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_NOT)
        )
        return Path(folder)


def _is_wanted(file: str) -> bool:
    if any(fnmatchcase(file, pattern) for pattern in _NOT):
        return False
    return any(fnmatchcase(file, pattern) for pattern in (WEIGHTS, *SETTINGS))


def _refuse_what_does_not_fit(listing: Listing) -> None:
    """Refuse a download that the cache's file system has no room for, before a byte of it is there."""
    need, free = listing.missing_bytes, free_bytes(Path(constants.HF_HUB_CACHE))
    if free is not None and need > free:
        raise ConversionError(
            f"{listing.name}: the download takes {size_text(need)}, and {size_text(free)} are free in the Hub's cache "
            f"({constants.HF_HUB_CACHE}); free space or set HF_HOME to a folder on another disk"
        )
