"""A model of the Hub by its settings and the headers of its weights: enough to plan a conversion, without the weights.

The stand-in is a folder with the model's settings and, for each file of weights, a file with the same header and a hole
where the weights would be. It takes some MiB, and whoever reads headers reads it like the model itself.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from .background import each
from .download import THREADS, download_settings
from .failures import one_line
from .listing import Listing
from .patience import Patience


@contextmanager
def stand_in(listing: Listing) -> Iterator[Path]:
    """Yield the folder of a model's settings and headers, which goes when the context ends.

    Raises:
        ConversionError: the Hub does not give them, or nothing comes for minutes.
    """
    with tempfile.TemporaryDirectory(prefix="milo-") as root:
        folder = Path(root) / listing.name.repository
        settings = download_settings(listing)
        shutil.copytree(settings, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        patience = Patience(str(listing.name), folder)
        with one_line(str(listing.name)):
            list(
                each(listing.shards, lambda shard, _: _write_header(listing, shard, folder / shard), THREADS, patience)
            )
        yield folder


def _write_header(listing: Listing, shard: str, path: Path) -> None:
    found = HfApi().parse_safetensors_file_metadata(listing.name.repository, shard, revision=listing.commit)
    entries = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for name, tensor in found.tensors.items()
    }
    header = json.dumps(entries).encode()
    end = max((tensor.data_offsets[1] for tensor in found.tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
