"""Which launches have been compiled on this machine before, as a note beside Triton's machine code says.

Triton itself finds that out only where it would compile next, in the process that asks. The note lies in Triton's
cache, so that whoever empties the cache takes it too. It may be wrong where Triton is told to compile otherwise by
variables of the environment: then the launch is compiled in this process, which takes longer and is no error.
"""

from __future__ import annotations

import contextlib
import hashlib

import triton
from triton.runtime.cache import get_cache_manager

from ..launch import Launch

NOTE = "milo"
"""The name of the file in Triton's cache."""


def is_known(launch: Launch) -> bool:
    """Return whether a launch has been compiled for the current device, by any process of this machine."""
    place = _place(launch)
    return place is not None and get_cache_manager(place).get_file(NOTE) is not None


def remember(launch: Launch) -> None:
    """Note that a launch has been compiled for the current device, where the cache can be written."""
    place = _place(launch)
    with contextlib.suppress(OSError):  # as with a cache that came with an image
        if place is not None and get_cache_manager(place).get_file(NOTE) is None:
            get_cache_manager(place).put(NOTE, NOTE, binary=False)


def _place(launch: Launch) -> str | None:
    """Return the key under which a launch is noted; None of what is no kernel of Triton's compiler."""
    source = getattr(launch.kernel, "cache_key", None)
    if source is None:
        return None
    target = triton.runtime.driver.active.get_current_target()
    text = repr((triton.__version__, target, source, launch.kinds()))
    return hashlib.sha256(text.encode()).hexdigest()
