"""Which Triton the kernels' machine code was looked through with.

:func:`.dequant.finished` works around a bug of Triton by a form that Triton happens to compile well. That it does is
proved by a search of the machine code (``tests/register_hazards.py``), and only for the Triton that was searched.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.milo")

PROVED_TRITON = ("3.6.0",)
"""Versions whose machine code was searched."""


def warn_if_unproved(version: str) -> None:
    """Log one line if the machine code of this version was never searched."""
    if version.split("+")[0] not in PROVED_TRITON:
        logger.warning(
            "MiLo's kernels were proved to keep the registers of running MMAs with Triton %s only, and this is %s: "
            "results may be wrong now and then",
            ", ".join(PROVED_TRITON),
            version,
        )
