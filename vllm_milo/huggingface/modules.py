"""Layers of transformers that hold the packed weights of a MiLo checkpoint and compute with the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_milo.kernels import ops
from vllm_milo.kernels.weights import ExpertWeights, LinearSpec, LinearWeights, MoESpec


class Packed(nn.Module):
    """The tensors of one operator, as in the checkpoint until a device uses them whose backend has another layout.

    They move with the model, and keep their dtypes when it is cast.

    Args:
        operator: ``linear`` or ``fused_moe``.
        weights: in the checkpoint layout.
        spec: of the operator.
    """

    def __init__(self, operator: str, weights: LinearWeights | ExpertWeights, spec: LinearSpec | MoESpec) -> None:
        super().__init__()
        self._operator, self._spec, self._type = operator, spec, type(weights)
        self._backend = "torch"
        self._hold([tensor for tensor in weights if tensor is not None])

    def on(self, x: torch.Tensor) -> tuple[list[torch.Tensor], str]:
        """Return the tensors as the backend that computes with these activations takes them, and that backend.

        Raises:
            RuntimeError: they are laid out for another backend already.
        """
        takes_kernels = x.dtype in (torch.float16, torch.bfloat16)
        backend = ops.choose_backend(self._operator, x.device.type) if takes_kernels else "torch"
        if backend != self._backend:
            if self._backend != "torch":
                raise RuntimeError(
                    f"MiLo weights that were used on a GPU are laid out for its kernels, and cannot be used with "
                    f"{x.dtype} on {x.device}: load the checkpoint again"
                )
            prepare: Callable[..., list[torch.Tensor]] = (
                ops.prepare_linear if self._type is LinearWeights else ops.prepare_experts
            )
            self._hold(prepare(self._type(*self._held()), self._spec, backend))
            self._backend = backend
        return self._held(), self._backend

    def _held(self) -> list[torch.Tensor]:
        return list(self._buffers.values())  # type: ignore[arg-type]

    def _hold(self, tensors: list[torch.Tensor]) -> None:
        self._buffers.clear()
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"tensor_{index}", tensor, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Packed:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)


class MiLoLinear(nn.Linear):
    """A linear layer of a MiLo checkpoint; its ``weight`` is None.

    Args:
        replaced: the layer of the model, whose bias it takes over.
    """

    packed: Packed

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__(replaced.in_features, replaced.out_features, bias=False, device="meta")
        self.register_parameter("weight", None)
        self.bias = replaced.bias
        self._is_hf_initialized = True  # for transformers, which would initialize the weight

    def fill(self, weights: LinearWeights, spec: LinearSpec) -> None:
        """Take over the packed weights."""
        self.spec = spec
        self.packed = Packed("linear", weights, spec)

    @property
    def qweight(self) -> torch.Tensor:
        """The packed weights, by the name under which PEFT looks for the device of a quantized layer."""
        return next(self.packed.buffers())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ + (x·Vᵀ)·U + bias, [..., K] -> [..., N] in the dtype of x.

        Raises:
            RuntimeError: x asks for a gradient.
        """
        _refuse_gradient(x)
        tensors, backend = self.packed.on(x)
        out = ops.linear(x, tensors, self.spec, backend)
        return out if self.bias is None else out + self.bias


class MiLoHead(nn.Linear):
    """The output head of a MiLo checkpoint that stores it as integers; here it has the weights that they stand for.

    Args:
        replaced: the head of the model, whose bias it takes over; its ``weight`` is None until :meth:`fill`.
    """

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__(replaced.in_features, replaced.out_features, bias=False, device="meta")
        self._dtype = replaced.weight.dtype
        self.register_parameter("weight", None)
        self.bias = replaced.bias
        self._is_hf_initialized = True  # for transformers, which would initialize the weight

    def fill(self, weight: torch.Tensor) -> None:
        """Take over the weights [V, H], in the model's dtype."""
        self.weight = nn.Parameter(weight.to(self._dtype), requires_grad=False)


class MiLoExperts(nn.Module):
    """The routed experts of one layer of a MiLo checkpoint."""

    w13: Packed
    w2: Packed

    def __init__(self) -> None:
        super().__init__()
        self._is_hf_initialized = True

    def fill(self, w13: ExpertWeights, w2: ExpertWeights, spec: MoESpec) -> None:
        """Take over the packed weights of gate and up projections, and of down projections."""
        self.spec = spec
        self.w13, self.w2 = (Packed("fused_moe", weights, spec) for weights in (w13, w2))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        """Return the experts' weighted sum for each token, [T, H] in the dtype of ``hidden_states``.

        Args:
            hidden_states: [T, H].
            top_k_index: experts [T, k].
            top_k_weights: router weights [T, k].

        Raises:
            RuntimeError: ``hidden_states`` or the router weights ask for a gradient.
        """
        _refuse_gradient(hidden_states)
        _refuse_gradient(top_k_weights)
        w13, backend = self.w13.on(hidden_states)
        w2, backend = self.w2.on(hidden_states)
        return ops.fused_moe(hidden_states, top_k_weights, top_k_index, None, w13, w2, self.spec, backend)


def _refuse_gradient(x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "MiLo layers pass no gradients on, so a MiLo model cannot be trained, nor what comes before such a layer; "
            "for inference run it under torch.no_grad()"
        )
