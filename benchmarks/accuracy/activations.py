"""Second moments XᵀX of the inputs of a model's matrices, of routed experts over the tokens that reach them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.accuracy.quantized_model import QuantizedModel

Hook = Callable[..., None]


class _StopForwardError(Exception):
    """Ends a forward pass after the last layer of interest."""


@torch.inference_mode()
def second_moments(
    model: QuantizedModel, windows: torch.Tensor, batch: int, layer: int | None = None
) -> dict[str, torch.Tensor]:
    """Run the model as it is on token windows and return the moments of its matrices' inputs.

    Args:
        model: the model; its present weights count.
        windows: token ids, int64 [..., T].
        batch: windows of a forward pass.
        layer: only this decoder layer; later ones are not run.

    Returns:
        float32 [K, K] by matrix; matrices with the same inputs may share one tensor.
    """
    moments: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name, module in model.linears.items():
            if _is_wanted(name, layer):
                moments[name] = _zeros(model, name)
                _attach(stack, module, _linear_hook(moments[name]))
        for name, module in model.experts.items():
            if _is_wanted(name, layer):
                hidden, inner = _experts_moments(model, name, module)
                moments |= {
                    matrix: (inner if model.kind(matrix) == "routed_down" else hidden)[entry.expert or 0]
                    for matrix, entry in model.matrices.items()
                    if entry.experts == name
                }
                _attach(stack, module, _experts_hook(module, hidden, inner))
        if layer is not None:
            handle = model.model.model.layers[layer].register_forward_hook(_stop)
            stack.callback(handle.remove)
        for ids in windows.flatten(0, -2).split(batch):
            with contextlib.suppress(_StopForwardError):
                model.model.model(input_ids=ids.to(model.model.device), use_cache=False)
    return moments


def layers_of(model: QuantizedModel) -> Iterator[int]:
    """Yield the indices of the decoder layers."""
    yield from range(len(model.model.model.layers))


def _is_wanted(name: str, layer: int | None) -> bool:
    return layer is None or name.startswith(f"model.layers.{layer}.")


def _zeros(model: QuantizedModel, name: str) -> torch.Tensor:
    k = model.views[name].shape[1]
    return torch.zeros(k, k, device=model.views[name].device)


def _experts_moments(model: QuantizedModel, name: str, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    experts, hidden, inner = module.down_proj.shape
    device = model.model.device
    return torch.zeros(experts, hidden, hidden, device=device), torch.zeros(experts, inner, inner, device=device)


def _attach(stack: contextlib.ExitStack, module: Any, hook: Hook) -> None:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)


def _linear_hook(moment: torch.Tensor) -> Hook:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = (args[0] if args else kwargs["input"]).flatten(0, -2)
        moment.addmm_(rows.T, rows)

    return hook


def _experts_hook(module: Any, hidden: torch.Tensor, inner: torch.Tensor) -> Hook:
    """Add up the moments of an experts module: of its input, and of the activations that its own weights make."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
        for expert in range(hidden.shape[0]):
            rows = states[(chosen == expert).any(-1)]
            hidden[expert].addmm_(rows.T, rows)
            gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            activations = module.act_fn(gate) * up
            inner[expert].addmm_(activations.T, activations)

    return hook


def _stop(*_: Any) -> None:
    raise _StopForwardError
