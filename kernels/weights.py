"""The tensors of quantized layers as the operators take them, in the checkpoint layout.

A backend may turn them into a layout of its own (:mod:`.ops`); the tuples keep their meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from .packing import WORDS_PER_UNIT
from .sizes import cdiv


class LinearSpec(NamedTuple):
    """What the shapes of :class:`LinearWeights` do not say.

    A fused layer (QKV, gate_up) has several parts; part i has ``widths[i]`` outputs and its own
    compensator of rank ``ranks[i]``.
    """

    widths: list[int]
    ranks: list[int]
    group_size: int
    factor_bits: int


class LinearWeights(NamedTuple):
    """One linear layer: W = s·(q - z), plus Uᵢᵀ·Vᵢ on the rows of part i.

    Shapes, with N = sum(widths), R = sum(ranks) and 3-bit factors (8 and 16 bits: as many elements as
    values): packed int32 [N, 3K/32]; scale, zero fp16 [N, K/g]; u int32, 1-D, the parts' [rᵢ, 3Nᵢ/32] one
    after another, since parts differ in width; u_scale fp16, 1-D, likewise [rᵢ, Nᵢ/64]; v int32 [R, 3K/32];
    v_scale fp16 [R, K/64]. Factors are empty where R is 0, their scales where factor_bits is 16.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    u: torch.Tensor
    u_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor


UNGATED = ("relu2_no_mul",)
"""Activations, by vLLM's names, of experts that have no gate: the up projection is all that they read."""
STEP = "swiglustep"
"""vLLM's name of Step-3.5's activation: not what SiLU gets of gate has a limit, but what it gives."""


class MoESpec(NamedTuple):
    """What the shapes of :class:`ExpertWeights` do not say, for both GEMMs of a layer.

    ``max_ranks`` are what :func:`largest_rank` says of w13 and w2: buffers and grids are sized by them, since
    reading the ranks would wait for the device. The group sizes of the two GEMMs may differ; the shapes say them.

    ``activation`` is a name in :mod:`.reference`; :data:`UNGATED` ones have no gate, so that w13 is the up projection
    alone. With a gate, gate is at most ``limit`` and up within ±limit, where that is not 0, and ``silu`` is
    gate·sigmoid(alpha·gate)·(up + beta). Of :data:`STEP`, which needs a limit, silu(gate) is at most that, not gate.
    """

    factor_bits: int
    activation: str
    router_weight_on_input: bool
    max_ranks: list[int]
    limit: float = 0.0
    alpha: float = 1.0
    beta: float = 0.0

    @property
    def is_gated(self) -> bool:
        """Whether w13 holds gate and up, not up alone."""
        return self.activation not in UNGATED

    @property
    def is_plain(self) -> bool:
        """Whether the activation has a gate and none of the constants changes it."""
        return self.is_gated and (self.limit, self.alpha, self.beta) == (0.0, 1.0, 0.0)


class MoEShape(NamedTuple):
    """What decides the tiles of a MoE layer in this process, beside the device and the number of tokens.

    Attributes:
        experts: local experts.
        top_k: experts of a token.
        hidden: hidden size, padded to a multiple of 64.
        intermediate: this process's share of an expert's intermediate size, likewise.
        groups: group sizes of both GEMMs.
        ranks: largest ranks of both GEMMs, as in :class:`MoESpec`.
        parts: 2, gate and up, or 1 where experts have no gate.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    groups: tuple[int, int]
    ranks: tuple[int, int]
    parts: int = 2


class ExpertWeights(NamedTuple):
    """One grouped GEMM over E experts, of P parts each (w13: gate and up, or up alone; w2: one), N/P outputs a part.

    Shapes, with R = all ranks of all experts and parts and 3-bit factors: packed int32 [E, N, 3K/32]; scale,
    zero fp16 [E, N, K/g]; u int32 [R, 3(N/P)/32]; u_scale fp16 [R, N/P/64]; v int32 [R, 3K/32]; v_scale fp16
    [R, K/64]; rank_offsets int32 [E·P + 1]: part p of expert e owns the factor rows rank_offsets[e·P + p] to
    rank_offsets[e·P + p + 1]. Ranks are ragged: nothing is padded to the largest. bias fp32 [E, N], in the order of the
    rows; None where experts have none.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    u: torch.Tensor
    u_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    rank_offsets: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def present(self) -> list[torch.Tensor]:
        """The tensors that there are: all but the bias of experts that have none."""
        return [tensor for tensor in self if tensor is not None]

    @property
    def group_size(self) -> int:
        """Codes along K that share a scale and a zero point."""
        return self.packed.shape[-1] * 32 // WORDS_PER_UNIT // self.scale.shape[-1]


RANK_BLOCK = 16
"""Kernels take ranks in blocks of so many; the ranks of each part are padded to whole blocks."""


def rank_blocks(rank: int) -> int:
    """Return how many blocks of 16 ranks a part of this rank takes."""
    return cdiv(rank, RANK_BLOCK)


def largest_rank(ranks: Iterable[Sequence[int]]) -> int:
    """Return the largest rank of an expert, its parts padded to whole blocks and added; ``ranks[e][p]``."""
    return max((RANK_BLOCK * sum(map(rank_blocks, expert)) for expert in ranks), default=0)


def offsets(sizes: list[int]) -> list[int]:
    """Return where each of consecutive blocks starts, and where the last ends."""
    return [0, *accumulate(sizes)]


def factor_elements(columns: int, factor_bits: int) -> int:
    """Return how many stored elements a factor row of ``columns`` values takes."""
    return columns * WORDS_PER_UNIT // 32 if factor_bits == 3 else columns
