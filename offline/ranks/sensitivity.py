"""How much the relative error of a matrix matters to the model, without data.

A matrix that every token passes counts in full, a routed expert in proportion to the tokens it sees and, where the
router's weights are not normalized over the chosen experts, to their square. Roles within a layer weigh as measured
on small trained MoEs, in loss per relative squared error: attention's values and output projection count most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nouns import Kind, Matrix
from ..source.family import Family

ROLES = {"q_proj": 1.0, "k_proj": 1.5, "v_proj": 3.0, "o_proj": 2.5}
FFN_ROLES = {"gate": 1.0, "up": 0.7, "down": 1.7}
UNNORMALIZED = 0.25
"""Square of what the weights of the chosen experts add up to where nothing makes that 1: about a half."""


def sensitivity(matrix: Matrix, family: Family, config: Mapping[str, Any]) -> float:
    """Return the weight of a matrix's relative squared error in the model's loss, up to a common factor."""
    leaf = matrix.name.rpartition(".")[2]
    if matrix.kind is Kind.ATTENTION:
        return ROLES.get(leaf, 1.0)
    role = FFN_ROLES[family.role(leaf)]
    if matrix.kind is not Kind.ROUTED_EXPERT:
        return role
    return role * _use(family, config)


def _use(family: Family, config: Mapping[str, Any]) -> float:
    chosen = int(config.get("num_experts_per_tok", 2))
    normalized = bool(config.get("norm_topk_prob", family.normalizes_router))
    return chosen / family.num_experts(config) * (1.0 if normalized else UNNORMALIZED)
