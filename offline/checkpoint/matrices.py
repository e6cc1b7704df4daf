"""Which tensors and which entry of the rank table a quantized matrix becomes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from vllm_milo.checkpoint import PACKED, SCALE, U_SCALE, V_SCALE, ZERO, RankTable, U, V
from vllm_milo.kernels.packing import pack_codes

from ..nouns import Matrix
from ..solve.methods import Solved
from .writer import CheckpointWriter


def rank_table(matrices: Sequence[Matrix], ranks: Mapping[str, int]) -> RankTable:
    """Return the checkpoint's rank table: exact names, and one number where all experts agree."""
    modules = {m.name: ranks[m.name] for m in matrices if m.experts is None and ranks[m.name]}
    by_projection: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for matrix in matrices:
        if matrix.experts is not None and matrix.expert is not None:
            projection = matrix.name.rpartition(".")[2]
            by_projection[matrix.experts][projection][matrix.expert] = ranks[matrix.name]
    experts: dict[str, dict[str, int | list[int]]] = {}
    for name, projections in by_projection.items():
        table: dict[str, int | list[int]] = {}
        for projection, by_expert in projections.items():
            values = [by_expert[index] for index in sorted(by_expert)]
            table[projection] = values[0] if len(set(values)) == 1 else values
        if any(table.values()):
            experts[name] = table
    return RankTable(0, modules, experts)


def add_matrix(writer: CheckpointWriter, name: str, solved: Solved) -> None:
    """Write the tensors of a quantized matrix."""
    writer.add(f"{name}.{PACKED}", pack_codes(solved.base.codes))
    writer.add(f"{name}.{SCALE}", solved.base.scale)
    writer.add(f"{name}.{ZERO}", solved.base.zero)
    if solved.pair is None:
        return
    for factor, tensor, scale in ((solved.pair.u, U, U_SCALE), (solved.pair.v, V, V_SCALE)):
        writer.add(
            f"{name}.{tensor}", pack_codes(factor.values) if factor.values.dtype == torch.uint8 else factor.values
        )
        if factor.scale is not None:
            writer.add(f"{name}.{scale}", factor.scale)
