"""The data-free sensitivity of matrices."""

from __future__ import annotations

import pytest

from vllm_milo.offline.nouns import Kind, Matrix
from vllm_milo.offline.ranks.sensitivity import sensitivity
from vllm_milo.offline.source.families import FAMILIES


def test_sensitivity_follows_use():
    expert = Matrix("model.layers.0.mlp.experts.3.up_proj", Kind.ROUTED_EXPERT, 64, 64, "model.layers.0.mlp.experts", 3)
    shared = Matrix("model.layers.0.mlp.shared_expert.up_proj", Kind.SHARED_EXPERT, 64, 64)
    config = {"num_experts": 32, "num_experts_per_tok": 4}
    family = FAMILIES["qwen2_moe"]
    normalized = sensitivity(expert, family, config | {"norm_topk_prob": True})
    assert normalized == pytest.approx(sensitivity(shared, family, config) / 8)
    assert sensitivity(expert, family, config) < normalized
    mixtral = expert._replace(name="model.layers.0.block_sparse_moe.experts.3.w3")
    config = {"num_local_experts": 8, "num_experts_per_tok": 2}
    assert sensitivity(mixtral, FAMILIES["mixtral"], config) == pytest.approx(0.7 / 4)
    value = Matrix("model.layers.0.self_attn.v_proj", Kind.ATTENTION, 64, 64)
    assert sensitivity(value, family, config) > sensitivity(value._replace(name="x.q_proj"), family, config)
