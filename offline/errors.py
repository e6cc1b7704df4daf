"""The converter's error."""

from __future__ import annotations


class ConversionError(ValueError):
    """A model cannot be converted; the message names what, where and what to do."""
