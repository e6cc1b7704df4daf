"""Brings a layer's tensors into the kernel layout with a handful of launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...weights import ExpertWeights, LinearSpec, LinearWeights
from ..layout import (
    KernelWeights,
    checkpoint_columns,
    padded_bias,
    ranks_of_experts,
    scale_exponents,
    serving_tables,
)
from ..padding import check_factors
from .base import repack_base
from .factors import repack_down, repack_up
from .norms import largest_row_norms
from .tables import rank_table, row_table


def prepare_experts(weights: ExpertWeights, factor_bits: int) -> KernelWeights:
    """Bring one expert GEMM's tensors from the checkpoint layout to the kernel layout, as :mod:`..layout` does.

    Raises:
        ValueError: the factors are integers with a scale for 64 values, and a size is no multiple of 64.
    """
    experts, rows = weights.packed.shape[:2]
    ranks = ranks_of_experts(weights)
    parts = len(ranks) // experts
    widths = [rows // parts] * parts
    check_factors(widths * experts, ranks, checkpoint_columns(weights.packed), factor_bits)
    weights = ExpertWeights(*(tensor.contiguous() for tensor in weights.present))
    norms = largest_row_norms(weights, factor_bits) if parts == 2 else weights.scale.new_empty(0).float()
    repacked = _repack(weights[:7], widths, ranks, widths * experts, factor_bits, norms)
    return repacked._replace(bias=padded_bias(weights, widths))


def prepare_linear(weights: LinearWeights, spec: LinearSpec) -> KernelWeights:
    """Bring a dense layer's tensors from the checkpoint layout to the kernel layout: one expert.

    Raises:
        ValueError: the factors are integers with a scale for 64 values, and a size is no multiple of 64.
    """
    check_factors(spec.widths, spec.ranks, checkpoint_columns(weights.packed), spec.factor_bits)
    base = (tensor.contiguous().unsqueeze(0) for tensor in weights[:3])
    norms = weights.scale.new_empty(0).float()
    return _repack(
        (*base, *(tensor.contiguous() for tensor in weights[3:])),
        spec.widths,
        spec.ranks,
        spec.widths,
        spec.factor_bits,
        norms,
    )


def _repack(
    tensors: Sequence[torch.Tensor],
    own_widths: Sequence[int],
    ranks: list[int],
    widths: list[int],
    bits: int,
    norms: torch.Tensor,
) -> KernelWeights:
    """Launch what brings over all but the norms.

    Args:
        tensors: packed, scale and zero with a dimension of experts; u, u_scale, v, v_scale.
        own_widths: outputs of the parts of an expert.
        ranks: of all parts of all experts.
        widths: outputs of them.
        bits: of the factors.
        norms: of the result.
    """
    packed, scale, zero, u, u_scale, v, v_scale = tensors
    columns, device = checkpoint_columns(packed), packed.device
    table = rank_table(ranks, widths, bits, device)
    exponents = scale_exponents(scale)
    return KernelWeights(
        *repack_base(packed, scale, zero, exponents, row_table(own_widths, device)),
        *repack_up(u, u_scale, table, ranks, widths, bits),
        *repack_down(v, v_scale, table, columns, bits),
        *serving_tables(ranks, widths, device),
        norms,
        exponents,
    )
