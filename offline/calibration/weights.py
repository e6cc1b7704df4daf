"""Looks at all weights of a model before hours are spent on it: what the last layer holds should not be found then."""

from __future__ import annotations

from ..progress import progress_bar
from ..source.reader import ModelReader


def refuse_broken_weights(reader: ModelReader, progress: bool = False) -> None:
    """Read all tensors of a model once.

    Raises:
        ConversionError: names the first that holds NaN or Inf.
    """
    for layer in progress_bar(reader.layers, "check weights", progress):
        for tensor in dict.fromkeys([*(source.tensor for source in layer.matrices), *layer.others]):
            reader.load_finite(tensor)
