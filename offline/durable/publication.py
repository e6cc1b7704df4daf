"""Gives a finished folder its name, with a way back at every point."""

from __future__ import annotations

import os
from pathlib import Path

from .exchange import exchange
from .files import flush

SEALED = "sealed.json"
"""File of a hidden folder that says where its checkpoint is published and the sha256 of its manifest; written before
that, so that another process can tell whether it happened."""


def publish(folder: Path, target: Path, replaced: Path) -> None:
    """Let ``folder`` become ``target`` in one rename.

    What stands at ``target`` and ``folder`` change places in one step, where the system can do that: a kill at any
    point leaves the old or the new one there, whole. Elsewhere the old one goes to ``replaced`` first; a kill between
    these two renames leaves nothing at ``target``, and the next conversion to it brings the old one back. If a rename
    fails, the old one comes back at once.

    Args:
        folder: what is published, flushed to the disk. The old one is here afterwards if the two changed places.
        target: its name, taken or not.
        replaced: a free name for what is there.

    Raises:
        OSError: a folder cannot be renamed.
    """
    if not target.exists():
        os.rename(folder, target)
    elif not exchange(folder, target):
        os.rename(target, replaced)
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(replaced, target)
            raise
    flush(target.parent)
