"""What a family's entry is made of: slots for the matrices of a layer, and blocks of them that many families share."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from ..nouns import Kind


class Cut(StrEnum):
    """How vLLM cuts a matrix [N, K] over the ranks of tensor parallelism.

    ``outputs`` are rows and ``inputs`` columns; ``keys`` are rows too, but heads of keys and values, which are repeated
    where there are more ranks than heads; ``whole`` is not cut.
    """

    OUTPUTS = "outputs"
    INPUTS = "inputs"
    KEYS = "keys"
    WHOLE = "whole"


class Slot(NamedTuple):
    """A linear layer that is quantized: its name inside a decoder layer, what it is part of, and how it is cut."""

    name: str
    kind: Kind
    cut: Cut = Cut.OUTPUTS


class Projections(NamedTuple):
    """The names of an expert's three matrices, or of another FFN's; None for a gate that there is not."""

    gate: str | None
    up: str
    down: str

    @property
    def present(self) -> tuple[str, ...]:
        """Return the names of those that there are."""
        return tuple(name for name in self if name is not None)


class FusedTensor(NamedTuple):
    """A 3-D tensor [E, N, K] of the MoE block: its name inside the block, and whose matrices are stacked along N.

    ``holds`` are roles: ``gate``, ``up``, ``down``. ``transposed`` says that its makers store [E, K, N], ``in_memory``
    that transformers holds it so as well. ``interleaved`` says that rows of gate and of up alternate.
    """

    name: str
    holds: tuple[str, ...]
    transposed: bool = False
    in_memory: bool = False
    interleaved: bool = False


class Rename(NamedTuple):
    """A name that transformers 5 gives a part of a decoder layer in memory, and the one that checkpoints have.

    Both are beginnings of names inside the layer; where several fit, the first in a family's list counts.
    """

    memory: str
    checkpoint: str


class Stack(NamedTuple):
    """A tensor of a layer that transformers 5 makes of several of one size, stacked along their first dimension."""

    memory: str
    parts: tuple[str, ...]


LLAMA = Projections("gate_proj", "up_proj", "down_proj")
MIXTRAL = Projections("w1", "w3", "w2")
UNGATED = Projections(None, "up_proj", "down_proj")
FUSED = (FusedTensor("experts.gate_up_proj", ("gate", "up")), FusedTensor("experts.down_proj", ("down",)))
"""What transformers 5 holds in memory, and some checkpoints store."""
FUSED_UNGATED = (FusedTensor("experts.up_proj", ("up",)), FusedTensor("experts.down_proj", ("down",)))
"""The same of experts without a gate."""


def attention(name: str = "self_attn", out: str = "o_proj") -> tuple[Slot, ...]:
    """Return the slots of attention with queries, keys and values, of which several heads may share the latter."""
    return (
        Slot(f"{name}.q_proj", Kind.ATTENTION),
        Slot(f"{name}.k_proj", Kind.ATTENTION, Cut.KEYS),
        Slot(f"{name}.v_proj", Kind.ATTENTION, Cut.KEYS),
        Slot(f"{name}.{out}", Kind.ATTENTION, Cut.INPUTS),
    )


def latent_attention(name: str = "self_attn") -> tuple[Slot, ...]:
    """Return the slots of DeepSeek's multi-head latent attention, with a latent of the queries or without."""
    return (
        Slot(f"{name}.q_proj", Kind.ATTENTION),
        Slot(f"{name}.q_a_proj", Kind.ATTENTION, Cut.WHOLE),
        Slot(f"{name}.q_b_proj", Kind.ATTENTION),
        Slot(f"{name}.kv_a_proj_with_mqa", Kind.ATTENTION, Cut.WHOLE),
        Slot(f"{name}.kv_b_proj", Kind.ATTENTION),
        Slot(f"{name}.o_proj", Kind.ATTENTION, Cut.INPUTS),
    )


def ffn(name: str, kind: Kind, projections: Projections = LLAMA) -> tuple[Slot, ...]:
    """Return the slots of an FFN that every token passes: a dense one, or a shared expert."""
    *read, down = projections.present
    return (*(Slot(f"{name}.{projection}", kind) for projection in read), Slot(f"{name}.{down}", kind, Cut.INPUTS))


def dense(name: str = "mlp", projections: Projections = LLAMA) -> tuple[Slot, ...]:
    """Return the slots of the FFN of layers that have no experts."""
    return ffn(name, Kind.DENSE_FFN, projections)


def shared(name: str = "mlp.shared_experts", projections: Projections = LLAMA) -> tuple[Slot, ...]:
    """Return the slots of the shared experts, which are one FFN."""
    return ffn(name, Kind.SHARED_EXPERT, projections)
