"""The converter's error."""


class ConversionError(ValueError):
    """A model cannot be converted; the message names what, where and what to do."""
