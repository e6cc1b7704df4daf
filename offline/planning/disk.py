"""How much room a checkpoint takes on the disk, and how much there is."""

from __future__ import annotations

import shutil
from pathlib import Path

from vllm_milo.values import size_text

from ..errors import ConversionError


def free_bytes(out: Path) -> int | None:
    """Return what is free where ``out`` is or will be; None where the file system does not say."""
    place = next((folder for folder in (out, *out.resolve().parents) if folder.is_dir()), None)
    try:
        usage = shutil.disk_usage(place) if place is not None else None
    except OSError:
        return None
    return usage.free if usage is not None and usage.total else None


def refuse_what_does_not_fit(out: Path, need: int, there: int = 0, shards: int = 0) -> None:
    """Refuse an output that its file system has no room for.

    What ``--overwrite`` replaces does not count as room: it stays until the new checkpoint is whole.

    Args:
        out: the output folder, existing or not.
        need: bytes that the conversion takes there at most.
        there: bytes of an earlier conversion that it goes on with, or deletes when it begins.
        shards: how many of the needed bytes are the source's, which is downloaded shard by shard.

    Raises:
        ConversionError: with both numbers.
    """
    free = free_bytes(out)
    have = f" beside {size_text(there)} of unfinished layers" if there else ""
    source = f" with {size_text(shards)} of the source's shards" if shards else ""
    if free is not None and need > free + there:
        raise ConversionError(
            f"{out}: the checkpoint takes {size_text(need)}{source}, and {size_text(free)} are free on its file "
            f"system{have}; free space or choose another output"
        )
