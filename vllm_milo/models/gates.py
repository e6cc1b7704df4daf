"""Routers' gates: vLLM's own in 16 bits, whose product of few tokens a kernel of ours takes.

A gate has few outputs, so that a library's product is mostly its launch. Ours may start while the norm before it ends,
and lets the sort of routes after it start as early (:mod:`vllm_milo.kernels.serving.protocol`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_milo import compat
from vllm_milo.checkpoint import QUANT_METHOD
from vllm_milo.kernels import ops
from vllm_milo.kernels.serving.dense.wide import MOST_TOKENS
from vllm_milo.loading.ahead import start_gate

VARIABLE = "VLLM_MILO_GATES"
"""Set to 0, gates are multiplied as vLLM does it."""
NOTE = "milo_gates"
"""The key in vLLM's ``additional_config``, which tells compiled graphs apart: how many gates are ours."""


class GateMethod(UnquantizedLinearMethod):
    """vLLM's method of a gate, but for the product.

    Args:
        gate: the layer, whose weights are not loaded yet.
    """

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.backend = ops.choose_backend("linear", gate.weight.device.type)
        start_gate(gate.weight, gate.bias is not None)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the weights as they are, where vLLM would order them for a library."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x·Wᵀ + bias, in the dtype of x."""
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        # the operator asks the library then too, but would cost the host as much again
        if not torch.compiler.is_compiling() and x.shape[0] > MOST_TOKENS:
            return torch.nn.functional.linear(x, weight, bias)
        return ops.wide_linear(x, [weight], bias, self.backend)


def watch_gates() -> None:
    """Take the gates that vLLM makes in this process from now on, unless :data:`VARIABLE` says no."""
    if os.environ.get(VARIABLE) != "0" and compat.runs_on_nvidia() and not compat.is_batch_invariant():
        compat.watch_gates(take_gate)


def take_gate(gate: Any) -> None:
    """Give one of vLLM's gates :class:`GateMethod` where that is quicker, and vLLM has no method of its own for it.

    Args:
        gate: of the model under construction, just made; a model's that is not MiLo's stays as it is.
    """
    quantization = compat.quantization()
    if quantization is None or quantization.get_name() != QUANT_METHOD:
        return
    notes, weight = compat.graph_notes(), gate.weight
    rounded = getattr(gate, "out_dtype", None) in (None, weight.dtype)
    if notes is not None and rounded and type(gate.quant_method) is UnquantizedLinearMethod and _is_streamed(weight):
        gate.quant_method = GateMethod(gate)
        notes[NOTE] = notes.get(NOTE, 0) + 1


def _is_streamed(weight: torch.Tensor) -> bool:
    """Return whether few tokens are multiplied by such weights by a kernel of ours, which are in 16 bits."""
    n, k = weight.shape
    on_gpu = weight.device.type == "cuda" and weight.dtype.itemsize == 2
    return on_gpu and ops.choose_backend("linear", "cuda") == "triton" and ops.streams(n, k, weight.device)
