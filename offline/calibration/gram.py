"""Second moments of activations foretold by the weights alone: no data, no forward pass.

Training gives a matrix large weights where its inputs are large, so the Gram matrix WᵀW of the matrices that read an
activation is about E[x·xᵀ] up to a factor: on trained MoEs their deviations from the identity have a cosine of 0.4 to
0.6 for the inputs of a layer's attention and experts, 0.3 for the output projection. What is written foretells too: the
inner activations of an expert come from gate·gateᵀ and up·upᵀ, the inputs of the output projection from the values.
Every estimate is mixed with the identity, and the factor does not matter, since ranks are given by relative errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

import torch

from vllm_milo.names import QKV_PARTS

from ..errors import ConversionError
from ..nouns import Kind, LoadedMatrix, Matrix, Moments
from ..solve.precision import fast_products
from ..source.family import Family
from ..source.layers import Layer
from ..source.reader import ModelReader
from .moment_source import MAX_FULL_SIZE

RESIDUAL_SHARE = 0.25
"""Share of the identity in the moments of what attention and experts read from the residual stream."""
INNER_SHARE = 0.5
"""The same for inner activations, about which the weights say less."""
ROUNDS = 10
"""Rounds that suffice: more only fit an estimate more closely."""
FEEDBACK_ROUNDS = 2
"""Last rounds with error feedback: measured, as good in perplexity as feedback in all, and several times faster."""
_SMALLEST_NORM = 1e-3


class Activation(StrEnum):
    """What a matrix reads."""

    ATTENTION = "attention's input"
    HEADS = "attention's output"
    FFN = "the experts' input"
    INNER = "an expert's inner activations"


class Norms(NamedTuple):
    """The weights [H] of the norms before attention and before the experts."""

    attention: torch.Tensor
    ffn: torch.Tensor


class WeightMoments:
    """A source of moments: Gram matrices of the model's own weights; see :class:`LayerGrams`."""

    gradients = False

    def of_layer(self, reader: ModelReader, layer: Layer, loaded: Sequence[LoadedMatrix]) -> LayerGrams:
        """Return the moments of a layer's matrices.

        Raises:
            ConversionError: a norm is missing or not finite.
        """
        norms = Norms(*(_load_norm(reader, f"{layer.name}.{norm}.weight") for norm in reader.family.norms))
        heads = int(reader.config.get("num_attention_heads") or 1)
        head_size = int(reader.config.get("head_dim") or int(reader.config.get("hidden_size", heads)) // heads)
        return LayerGrams(reader.family, loaded, norms, head_size)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint's recipe records."""
        return {"calibration": "weights"}


class LayerGrams:
    """The moments of the inputs of one layer's matrices, up to a factor each.

    Args:
        family: the model's.
        loaded: the layer's matrices with their weights, one at least; what is not there (ignored layers) is left out
            of the sums.
        norms: of the layer.
        head_size: rows of the value projection that belong to one head.

    Matrices that read the same activation share one moment [1, K, K]; the inner activations of each expert have their
    own. Beyond :data:`MAX_FULL_SIZE` there is none.
    """

    def __init__(self, family: Family, loaded: Sequence[LoadedMatrix], norms: Norms, head_size: int) -> None:
        self._family = family
        device = loaded[0][1].device
        self._norms = Norms(*(norm.to(device) for norm in norms))
        self._head_size = head_size
        self._readers: dict[Activation, list[LoadedMatrix]] = {activation: [] for activation in Activation}
        self._weights: dict[str, torch.Tensor] = {}
        self._shared: dict[Activation, Moments] = {}
        for matrix, weights in loaded:
            self._readers[self._activation(matrix)].append((matrix, weights))
            self._weights[matrix.name] = weights

    def group(self, matrix: Matrix) -> str:
        """Return what the matrix reads."""
        return self._activation(matrix)

    def numbers(self, matrix: Matrix) -> int:
        """Return K² for inner activations, of which each expert has its own, else 0."""
        own = self._activation(matrix) is Activation.INNER and matrix.k <= MAX_FULL_SIZE
        return matrix.k**2 if own else 0

    def of(self, matrices: Sequence[Matrix], device: torch.device) -> Moments:
        """Return the moments of the inputs of matrices that read one activation."""
        if matrices[0].k > MAX_FULL_SIZE:
            return Moments()
        activation = self._activation(matrices[0])
        with fast_products(device):
            if activation is Activation.INNER:
                return Moments(torch.stack([self._inner(matrix) for matrix in matrices]))
            if activation not in self._shared:
                make = {Activation.ATTENTION: self._attention, Activation.HEADS: self._heads, Activation.FFN: self._ffn}
                self._shared[activation] = Moments(make[activation]().unsqueeze(0))
        return self._shared[activation]

    def _attention(self) -> torch.Tensor:
        """The residual stream as attention and experts see it, behind the norm of attention."""
        before = [self._attention_gram / _outer(self._norms.attention)]
        if self._readers[Activation.FFN]:
            before.append(self._ffn_gram / _outer(self._norms.ffn))
        return _mix(_sum_of_units(before) * _outer(self._norms.attention), RESIDUAL_SHARE)

    def _ffn(self) -> torch.Tensor:
        return _mix(self._ffn_gram, RESIDUAL_SHARE)

    def _heads(self) -> torch.Tensor:
        """What the output projection reads, and what the value projection writes, repeated for each query head."""
        (matrix, weights), *_ = self._readers[Activation.HEADS]
        grams = [_gram(weights)]
        values = self._weights.get(f"{matrix.name.rpartition('.')[0]}.v_proj")
        if values is not None and matrix.k % len(values) == 0 and len(values) % self._head_size == 0:
            heads = values.unflatten(0, (-1, self._head_size)).repeat_interleave(matrix.k // len(values), 0)
            grams.append(_gram(heads.flatten(0, 1).mT))
        return _mix(_sum_of_units(grams), INNER_SHARE)

    def _inner(self, matrix: Matrix) -> torch.Tensor:
        """What the down projection reads, and the product of what gate and up projection write."""
        grams = [_gram(self._weights[matrix.name])]
        written = [self._weights.get(name) for name in self._family.siblings(matrix.name, "gate", "up")]
        if written[0] is not None and written[1] is not None:
            gate, up = (_unit(_gram(weights.mT)) for weights in written if weights is not None)
            grams.append(gate * up)
        return _mix(_sum_of_units(grams), INNER_SHARE)

    @cached_property
    def _attention_gram(self) -> torch.Tensor:
        return _sum_of_units(_gram(weights) for _, weights in self._readers[Activation.ATTENTION])

    @cached_property
    def _ffn_gram(self) -> torch.Tensor:
        """Routed experts count together as much as a shared one."""
        members: dict[bool, list[torch.Tensor]] = {}
        for matrix, weights in self._readers[Activation.FFN]:
            members.setdefault(matrix.kind is Kind.ROUTED_EXPERT, []).append(weights)
        return _sum_of_units(_sum_of_grams(weights) for weights in members.values())

    def _activation(self, matrix: Matrix) -> Activation:
        leaf = matrix.name.rpartition(".")[2]
        if matrix.kind is not Kind.ATTENTION:
            return Activation.INNER if self._family.role(leaf) == "down" else Activation.FFN
        if leaf in QKV_PARTS:
            return Activation.ATTENTION
        if leaf == "o_proj":
            return Activation.HEADS
        raise ConversionError(f"{matrix.name}: nothing is known about this projection's inputs; use --calibration none")


def _load_norm(reader: ModelReader, tensor: str) -> torch.Tensor:
    if tensor not in reader.tensors:
        raise ConversionError(f"{tensor}: missing; are the model's files complete? Else use --calibration none")
    return reader.load_finite(tensor).float()


def _gram(weights: torch.Tensor) -> torch.Tensor:
    return weights.mT @ weights


def _sum_of_grams(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    total = _gram(matrices[0])
    for weights in matrices[1:]:
        total.addmm_(weights.mT, weights)
    return total


def _outer(norm: torch.Tensor) -> torch.Tensor:
    """Return the products of a norm's weights, kept away from 0 since moments are divided by them."""
    least = _SMALLEST_NORM * norm.abs().mean().clamp(min=1e-9)
    safe = torch.where(norm < 0, norm.clamp(max=-least), norm.clamp(min=least))
    return torch.outer(safe, safe)


def _unit(moment: torch.Tensor) -> torch.Tensor:
    """Return a moment divided by the mean of its diagonal."""
    return moment / moment.diagonal().mean().clamp(min=1e-30)


def _sum_of_units(moments: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([_unit(moment) for moment in moments]).sum(0)


def _mix(moment: torch.Tensor, share: float) -> torch.Tensor:
    """Return a moment of mean diagonal 1, of which the identity is ``share``."""
    identity = torch.eye(len(moment), device=moment.device)
    return (1 - share) * _unit(moment) + share * identity
