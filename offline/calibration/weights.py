"""Looks at all weights of a model before hours are spent on it: what the last layer holds should not be found then."""

from __future__ import annotations

import torch

from vllm_milo.checkpoint import BITS, GROUP_SIZES

from ..errors import ConversionError
from ..progress import progress_bar
from ..source.layers import BROKEN, Layer
from ..source.reader import ModelReader

WIDEST = 65504.0 * (2**BITS - 1)
"""Range of a group whose scale is fp16's largest."""


def refuse_broken_weights(reader: ModelReader, device: torch.device, progress: bool = False) -> None:
    """Read all tensors of a model once; those with fewer than 16 bits a weight become values on ``device``.

    Raises:
        ConversionError: names the first that holds NaN or Inf, or is to be quantized and too large for that.
    """
    for layer in progress_bar(reader.layers, "check weights", progress):
        refuse_broken_layer(reader, layer, device)


def refuse_broken_layer(reader: ModelReader, layer: Layer, device: torch.device) -> None:
    """Read the tensors of a layer once; see :func:`refuse_broken_weights`."""
    quantized = {source.tensor for source in layer.matrices}
    for tensor in dict.fromkeys([*(source.tensor for source in layer.matrices), *layer.others]):
        values = reader.load_finite(tensor, device)
        if tensor in quantized and _is_too_large(values):
            raise ConversionError(
                f"{reader.tensors[tensor].file}: tensor {tensor} holds weights up to "
                f"{values.float().abs().max().item():.3g}, which 3 bits with fp16 scales cannot store; {BROKEN}"
            )


def _is_too_large(values: torch.Tensor) -> bool:
    """Return whether even the smallest group of some weights [.., K] needs a scale above fp16's largest."""
    low, high = values.aminmax()
    if float(high) - float(low) <= WIDEST:
        return False
    groups = values.float().unflatten(-1, (-1, min(GROUP_SIZES)))
    return bool((groups.amax(-1) - groups.amin(-1) > WIDEST).any())
