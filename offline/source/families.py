"""The table of model families that MiLo converts. To add a family, add an entry to :data:`FAMILIES`.

Names of projections that no family had before go to :mod:`vllm_milo.names` too, which says what role they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_milo.values import shown

from ..errors import ConversionError
from .family import Family, Projections

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "mixtral",
            moe="block_sparse_moe",
            projections=Projections("w1", "w3", "w2"),
            num_experts_keys=("num_local_experts",),
            normalizes_router=True,
        ),
        Family("qwen2_moe", shared="shared_expert"),
        Family("qwen3_moe", num_experts_keys=("num_experts", "num_local_experts")),
        Family("olmoe", num_experts_keys=("num_experts", "num_local_experts")),
    )
}
_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a model by its config.json.

    Raises:
        ConversionError: the family is unknown, or is known but this model has no experts.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    known = ", ".join(sorted(FAMILIES))
    if family is None and not any(config.get(key) for key in _EXPERT_COUNT_KEYS):
        raise ConversionError(
            f"config.json: model_type {shown(model_type)} is not a Mixture-of-Experts model; MiLo converts {known}"
        )
    if family is None:
        raise ConversionError(
            f"config.json: model_type {shown(model_type)} is a MoE family that MiLo does not know; known are {known}"
        )
    family.num_experts(config)
    return family
