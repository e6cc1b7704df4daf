"""MiLo's entry in transformers' table of quantizations; :mod:`.on_import` says when it is made.

What it needs of torch's layers is imported when a checkpoint is loaded: vLLM's processes import this module too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_milo.checkpoint import QUANT_METHOD, TENSOR_NAMES, CheckpointError, MiLoFormat
from vllm_milo.head.layout import HEAD_TENSORS
from vllm_milo.values import shown

logger = logging.getLogger("vllm_milo")

_STORED = "|".join(name.removeprefix("weight_") for name in TENSOR_NAMES)
_PASSED_OVER = (r"\.milo_\w+$", r"\.parametrizations\.weight\.original1$", rf"\.({'|'.join(HEAD_TENSORS)})$")
"""What the names of a quantized matrix's tensors become by :meth:`MiLoHfQuantizer.get_weight_conversions`, and before
it by transformers, which takes a ``weight_v`` for that of its weight norm; and those of a quantized head."""


@register_quantization_config(QUANT_METHOD)
class MiLoHfConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a MiLo checkpoint, as transformers wants it.

    Args:
        stated: what config.json states.

    Raises:
        CheckpointError: the contract is broken or of a newer version.
    """

    def __init__(self, **stated: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # its own methods are an enumeration
        self.format = MiLoFormat.from_dict(stated)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json states."""
        return self.format.to_dict()


@register_quantizer(QUANT_METHOD)
class MiLoHfQuantizer(HfQuantizer):
    """Lets transformers load a MiLo checkpoint: quantized layers hold packed weights and compute with them."""

    _fill: Callable[[], None]

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse a model that is not quantized yet, and devices that a MiLo model is not spread over.

        Raises:
            CheckpointError: the message says what to do.
        """
        if not self.pre_quantized:
            raise CheckpointError("transformers cannot quantize a model to MiLo; `milo quantize MODEL -o OUT` does")
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        if len({str(place) for place in places}) > 1 or any(str(place) in _SPREAD for place in places):
            raise CheckpointError(
                f"device_map is {shown(device_map)}, but a MiLo model lies on one device, and is not offloaded; "
                f"pass device_map='cuda' or leave it out"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Check the checkpoint, and replace what is quantized by empty layers.

        Raises:
            CheckpointError, ShardError: the checkpoint is broken, or the model has no place for a matrix of it.
        """
        from .replace import replace_quantized

        if not checkpoint_files:
            raise CheckpointError("a MiLo model is loaded from its folder; pass no state_dict")
        self._fill = replace_quantized(model, Path(checkpoint_files[0]).parent)
        ignored = model._keys_to_ignore_on_load_unexpected
        ignored = [] if ignored is None else ignored  # a set, or in older versions a list
        model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, *_PASSED_OVER])
        # of a quantized model transformers leaves what it renames in the dtype of the file: the rest is an ordinary one
        self.pre_quantized = False

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Read the quantized matrices onto the model's device, and freeze the model.

        Raises:
            ShardError: a tensor cannot be read.
        """
        self.pre_quantized = True
        self._fill()
        del self._fill
        model.requires_grad_(False)

    def get_weight_conversions(self) -> list[Any]:
        """Return what keeps transformers from taking the tensors of quantized matrices for weights of its own."""
        from transformers.core_model_loading import WeightRenaming

        return [WeightRenaming(source_patterns=rf"\.weight_({_STORED})$", target_patterns=r".milo_\1")]

    def is_serializable(self) -> bool:
        """Return False: a checkpoint is copied, and made by the converter alone."""
        logger.warning("save_pretrained does not write MiLo checkpoints: copy the folder that this model came from")
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether gradients pass through the layers: they do not."""
        return False


_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
"""Values of ``device_map`` that spread a model, or offload it."""
