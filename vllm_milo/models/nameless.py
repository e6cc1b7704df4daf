"""Linear layers that a model of vLLM builds without a name, as DeepSeek-MoE-16B builds its attention.

Ranks and ``ignore`` go by names, so such a layer gets its parameters a little later: when it and a module that does
know its name stand below one parent. That is while the model is built, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from vllm_milo.values import CheckpointError

_nameless: WeakSet[torch.nn.Module] = WeakSet()
"""Layers without a name so far."""
_hooks: list[Any] = []
"""The hook by which torch tells of every module that a module gets, once there was such a layer."""


@register_weight_loader_v2_supported_method
class NamelessLinearMethod(LinearMethodBase):
    """Stands in for the method of a linear layer until the layer's name is found.

    Args:
        config: the ``QuantizationConfig`` that is then asked for the method.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **options: Any) -> None:
        """Keep what vLLM passes, for the method that the layer gets with its name."""
        self.sizes, self.options = sizes, options
        _nameless.add(layer)
        if not _hooks:
            _hooks.append(register_module_module_registration_hook(_find_names))

    def settle(self, layer: Any, name: str) -> None:
        """Give the layer the method of its name, and its parameters."""
        layer.prefix = name
        layer.quant_method = self.config.get_quant_method(layer, name)
        layer.quant_method.create_weights(layer, *self.sizes, **self.options)
        if hasattr(layer, "update_param_tp_status"):  # vLLM calls it after create_weights
            layer.update_param_tp_status()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Raise CheckpointError: the layer's name was never found."""
        raise _refusal(layer, "its model")

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Raise CheckpointError: the layer has no weights."""
        raise _refusal(layer, "its model")


def _find_names(parent: torch.nn.Module, leaf: str, child: torch.nn.Module) -> None:
    """Name the layers below a module that is about to get a child; see torch's module registration hooks.

    Raises:
        CheckpointError: a whole decoder layer was built, and nothing in it tells the name.
    """
    if not _nameless:
        return
    below = list(_modules_below(parent, leaf, child))
    layers: dict[Any, str] = {}
    for path, module in below:
        if module in _nameless:
            layers.setdefault(module, path)  # experts hold the shared one too, which stands beside them first
    if not layers:
        return
    prefix = _prefix_of_parent(below)
    for layer, path in layers.items():
        if prefix is not None:
            _nameless.discard(layer)
            layer.quant_method.settle(layer, f"{prefix}{path}")
        elif isinstance(parent, torch.nn.ModuleList) and layer is not child:
            raise _refusal(layer, type(child).__name__)


def _modules_below(parent: torch.nn.Module, leaf: str, child: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    yield from ((path, module) for path, module in parent.named_modules() if path)
    yield from ((f"{leaf}.{path}" if path else leaf, module) for path, module in child.named_modules())


def _prefix_of_parent(below: Iterable[tuple[str, torch.nn.Module]]) -> str | None:
    """Return what names below a module begin with: ``a.b.`` where the module at ``attn`` knows that it is ``a.b.attn``.

    That is nothing below the whole model; a name without its layer's number is not trusted to be whole.
    """
    for path, module in below:
        for name in (getattr(module, "layer_name", None), getattr(module, "prefix", None)):
            if not isinstance(name, str) or name.startswith("."):
                continue
            if name.endswith(f".{path}") or (name == path and ".layers." in name):
                return name.removesuffix(path)
    return None


def _refusal(layer: torch.nn.Module, where: str) -> CheckpointError:
    return CheckpointError(
        f"vLLM builds a {type(layer).__name__} of {where} without a name, and none is to be found around it: MiLo "
        f"cannot tell which matrices it holds; upgrade vLLM, or serve the model unquantized"
    )
