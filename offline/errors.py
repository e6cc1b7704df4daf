"""The converter's errors."""

from __future__ import annotations


class ConversionError(ValueError):
    """A model cannot be converted; the message names what, where and what to do."""


class PassingError(ConversionError):
    """What the next try may not meet again: a full disk, a file that cannot be read or written just now."""


class OtherTokenizerError(ConversionError):
    """The tokenizer gives ids that the model has no embedding of: one of the two is another model's."""


class FamilyError(ConversionError):
    """The model is of no family that MiLo converts, or has no experts."""
