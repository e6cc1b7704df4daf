"""What a model of the Hub consists of, at one commit."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, ModelInfo, constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from ..errors import ConversionError
from ..hub_names import ModelName
from .background import in_background
from .failures import one_line
from .patience import Patience

WEIGHTS = "*.safetensors"
SETTINGS = (
    *("*.json", "*.jinja", "*.py", "*.txt", "*.md", "*.model", "*.tiktoken"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""All that is taken beside weights: configuration, tokenizers, chat templates, remote code, licences."""
NOT_WANTED = ("*/*.safetensors", "consolidated*.safetensors")
"""The same weights once more, in the form of the model's makers; what is read lies at the top."""


class Listing(NamedTuple):
    """A model of the Hub at one commit.

    Attributes:
        sizes: bytes of the files that are wanted, by name.
        sha256: of those that the Hub says it of, weights among them, in hexadecimal digits.
    """

    name: ModelName
    commit: str
    sizes: dict[str, int]
    sha256: dict[str, str]

    @property
    def shards(self) -> list[str]:
        """Return the names of the files that hold weights."""
        return sorted(name for name in self.sizes if fnmatchcase(name, WEIGHTS))

    @property
    def missing_bytes(self) -> int:
        """Return the bytes that are not in the cache yet."""
        return sum(size for name, size in self.sizes.items() if self.cached_path(name) is None)

    @property
    def cache_folder(self) -> Path:
        """Return where the Hub's cache keeps the model; it need not be there yet."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name.repository, repo_type="model")

    def cached_path(self, name: str) -> Path | None:
        """Return where a file is in the cache; None where it is not."""
        path = try_to_load_from_cache(self.name.repository, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None


def look_up(name: ModelName) -> Listing:
    """Ask the Hub what a model consists of; nothing is downloaded.

    Raises:
        ConversionError: there is no such model or revision, it may not be read, the Hub cannot be reached, or the
            model has no safetensors files.
    """

    def ask() -> ModelInfo:
        return HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)

    with one_line(str(name)):
        info = in_background(ask, Patience(str(name)))
        files = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
        sizes = {file.rfilename: file.size or 0 for file in files}
        sha256 = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
        listing = Listing(name, str(info.sha), sizes, sha256)
    if not listing.shards:
        raise ConversionError(
            f"{name}: the model on the Hugging Face Hub has no *.safetensors file at its top; other weight formats are "
            f"not read"
        )
    return listing


def _is_wanted(file: str) -> bool:
    if any(fnmatchcase(file, pattern) for pattern in NOT_WANTED):
        return False
    return any(fnmatchcase(file, pattern) for pattern in (WEIGHTS, *SETTINGS))
