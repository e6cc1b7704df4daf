"""What one training step holds beside weights, by the shapes of a layer; counted in bytes a token.

The terms were read off the tensors that live during the forward and backward pass of transformers' decoder layers, with
each shape changed by itself (2026-11-28); ``tests/offline/calibration/test_step_memory.py`` counts them again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..source.config import stated
from ..source.layers import Layer
from ..source.reader import ModelReader

WINDOW = 512
"""Tokens that attention looks at in a calibration window."""
STEP_WINDOWS = {"cpu": 4, "cuda": 8}
"""Windows of a training step, where the command decides."""


class Shape(NamedTuple):
    """What a layer's activations go by: numbers of a token.

    Attributes:
        hidden: of its hidden state.
        attention: of all queries.
        heads: of attention.
        inner: between gate and down projection, of all experts that a token has.
        chosen: routed experts that a token has.
        experts: that the router chooses among.
    """

    hidden: int
    attention: int
    heads: int
    inner: int
    chosen: int
    experts: int


def step_tokens(device: str) -> int:
    """Return the tokens of a training step on a device."""
    return STEP_WINDOWS.get(torch.device(device).type, max(STEP_WINDOWS.values())) * WINDOW


def number_size(device: str) -> int:
    """Return the bytes of a number in weights and hidden states: 16 bits on GPUs, 32 on CPUs."""
    return 2 if torch.device(device).type == "cuda" else 4


def shape_of(reader: ModelReader, layer: Layer) -> Shape:
    """Return the shape of a layer by its matrices and the model's config."""
    config = reader.config
    hidden = stated(config, "hidden_size", reader.folder)
    heads = stated(config, "num_attention_heads", reader.folder)
    matrices = [source.matrix for source in layer.matrices]
    down = [matrix for matrix in matrices if matrix.name.rpartition(".")[2] == reader.family.projections.down]
    down += [matrix for matrix in matrices if matrix.name.endswith(".down_proj") and matrix not in down]
    routed = [matrix for matrix in down if matrix.experts is not None]
    chosen = min(int(config.get("num_experts_per_tok") or len(routed)), len(routed))
    inner = chosen * max((matrix.k for matrix in routed), default=0)
    inner += sum(matrix.k for matrix in down if matrix.experts is None)
    attention = heads * int(config.get("head_dim") or math.ceil(hidden / heads))
    return Shape(hidden, attention, heads, inner, chosen, len(routed))


def saved_bytes(shape: Shape, device: str, size: int) -> int:
    """Return what the forward pass of a layer keeps of a token for the backward pass, numbers of ``size`` bytes.

    On GPUs the float32 scores of attention count, which are kept where it is plain products; where it is FlashAttention
    (:mod:`..learn.repeatable`), less is taken.
    """
    states = size * (5 * shape.hidden + 2 * shape.chosen * shape.hidden + 4 * shape.inner + 7 * shape.attention)
    return states + _scores(shape, device) + 16 * shape.experts


def passing_bytes(shape: Shape, device: str, size: int) -> int:
    """Return what the backward pass of a layer holds of a token for a moment, at most.

    That is either of the experts, whose sum is in float32, or of attention, three times the scores, when what the
    experts kept is gone.
    """
    experts = max((6 + 14 * max(1, shape.chosen)) * shape.hidden, 2 * size * shape.inner)
    attention = 2 * _scores(shape, device) - size * 4 * shape.inner
    return max(experts, attention)


def logit_bytes(device: str, size: int) -> int:
    """Return the bytes of a token and a word of the vocabulary where predictions of two models are compared.

    Both models' logits of ``size`` bytes, float32 probabilities and their logarithms, and copies of one window.
    """
    return 2 * size + 8 + 16 * WINDOW // step_tokens(device)


def _scores(shape: Shape, device: str) -> int:
    return 4 * WINDOW * shape.heads if torch.device(device).type == "cuda" else 0
