"""Reads the packed matrices of a checkpoint as the operators take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_milo.checkpoint import PACKED, SCALE, U_SCALE, V_SCALE, ZERO, CompensatorFormat, MiLoFormat, U, V
from vllm_milo.kernels.weights import ExpertWeights, LinearSpec, LinearWeights, offsets
from vllm_milo.models.parameters import factor_dtype
from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors

Matrix = Mapping[str, torch.Tensor]
"""The tensors of a quantized matrix by their last names."""


def read_linear(tensors: DequantizedTensors, name: str, fmt: MiLoFormat) -> tuple[LinearWeights, LinearSpec]:
    """Return the weights of the linear layer ``name``, on the device of ``tensors``, and what the operator must know.

    Raises:
        ShardError: they cannot be read.
    """
    matrix = tensors.packed(name)
    n, rank = len(matrix[PACKED]), _rank(matrix)
    u, u_scale, v, v_scale = _factors([matrix], fmt.compensator)
    weights = LinearWeights(matrix[PACKED], matrix[SCALE], matrix[ZERO], u.flatten(), u_scale.flatten(), v, v_scale)
    return weights, LinearSpec([n], [rank], fmt.module_group_size(name), fmt.compensator.bits)


def read_experts(
    tensors: DequantizedTensors, names: Sequence[Sequence[str]], fmt: MiLoFormat
) -> tuple[ExpertWeights, list[list[int]]]:
    """Return the weights of one GEMM of all experts, on the device of ``tensors``, and their ranks.

    Args:
        tensors: of the checkpoint.
        names: of the matrices, by expert and part: ``names[e][p]``. The ranks are likewise.
        fmt: the checkpoint's format.

    Raises:
        ShardError: they cannot be read.
    """
    experts = [[tensors.packed(name) for name in parts] for parts in names]
    packed, scale, zero = (
        torch.stack([torch.cat([part[leaf] for part in parts]) for parts in experts]) for leaf in (PACKED, SCALE, ZERO)
    )
    ranks = [[_rank(part) for part in parts] for parts in experts]
    u, u_scale, v, v_scale = _factors([part for parts in experts for part in parts], fmt.compensator)
    starts = offsets([rank for parts in ranks for rank in parts])
    rank_offsets = torch.tensor(starts, dtype=torch.int32, device=packed.device)
    return ExpertWeights(packed, scale, zero, u, u_scale, v, v_scale, rank_offsets), ranks


def _rank(matrix: Matrix) -> int:
    return len(matrix[V]) if V in matrix else 0


def _factors(matrices: Sequence[Matrix], compensator: CompensatorFormat) -> list[torch.Tensor]:
    """Return U, its scales, V and its scales of matrices of one shape, their rows one after another."""
    first = matrices[0]
    n, k = len(first[PACKED]), first[PACKED].shape[1] * 32 // 3
    joined = []
    for leaf, scale, columns in ((U, U_SCALE, n), (V, V_SCALE, k)):
        groups = columns // compensator.group_size if compensator.quantized else 0
        for name, width in ((leaf, compensator.row(columns, "")[1]), (scale, groups)):
            dtype = factor_dtype(name, compensator, torch.float16)
            none = torch.empty(0, width, dtype=dtype, device=first[PACKED].device)
            joined.append(torch.cat([matrix[name] for matrix in matrices if name in matrix] or [none]))
    return joined
