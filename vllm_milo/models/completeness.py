"""Whether every parameter of a model was loaded, also those that are not quantized.

vLLM asks so of unquantized models only. A checkpoint that calls a router's bias otherwise than vLLM would leave it as
the memory was, and the model would answer nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vllm_milo.checkpoint import TENSOR_NAMES
from vllm_milo.values import CheckpointError

_SHOWN = 5
_WITHOUT = """--model-loader-extra-config '{"enable_weights_track": false}'"""


def check_loaded(model: torch.nn.Module, loaded: set[str] | None, **_: Any) -> None:
    """Refuse a model of which parameters were not loaded.

    Layers that are quantized check themselves, piece by piece, and may have no parameter for what was loaded.

    Args:
        model: after its ``load_weights``.
        loaded: names of parameters that it says were loaded, one of several names where modules are shared; None where
            the model does not say.

    Raises:
        CheckpointError: there are such parameters; the message names them.
    """
    if loaded is None:
        return
    excused = {id(parameter) for parameter in _excused(model)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in loaded:
            excused.add(id(parameter))
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in excused]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(
            f"{type(model).__name__}: the checkpoint has no tensor that vLLM loads as "
            f"{', '.join(missing[:_SHOWN])}{more}; convert the model from its publisher's files. If vLLM fills them "
            f"by other means, {_WITHOUT} serves it without this check"
        )


def _excused(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters that need no tensor: of MiLo's layers, and scales of the KV cache, which have defaults."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    from vllm_milo.fused_moe import MiLoMoEMethod
    from vllm_milo.linear import MiLoLinearMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        own = isinstance(method, MiLoLinearMethod | MiLoMoEMethod)
        if isinstance(method, BaseKVCacheMethod) or getattr(method, "uses_meta_device", False):
            yield from module.parameters()
        for name, parameter in module.named_parameters(recurse=False):
            # a layer of experts holds its router's bias too, which is not the method's
            if (own and name.endswith(TENSOR_NAMES)) or not parameter.numel():
                yield parameter
