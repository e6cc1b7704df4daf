"""What a token reads of a model, and what that costs."""

from __future__ import annotations

import pytest

from vllm_milo.kernels.resident import resident_bytes
from vllm_milo.offline.nouns import Kind, Matrix, Recipe
from vllm_milo.offline.served.costs import Costs, LayerCosts, shipped_costs
from vllm_milo.offline.served.load import held_by, read_shares, serving_line, serving_load
from vllm_milo.offline.served.target import Target, allow, find_target

RECIPE = Recipe(group_size=64)
COSTS = Costs(LayerCosts(1000.0, 1.0, 100.0, 2.0), LayerCosts(5000.0, 1.5, 200.0, 3.0))


def layer(index: int = 0, experts: int = 8) -> list[Matrix]:
    """Attention of four matrices and routed experts, sizes that fill the kernels' tiles."""
    prefix = f"model.layers.{index}"
    attention = [
        Matrix(f"{prefix}.self_attn.{leaf}", Kind.ATTENTION, n, 512)
        for leaf, n in (("q_proj", 512), ("k_proj", 128), ("v_proj", 128), ("o_proj", 512))
    ]
    name = f"{prefix}.block_sparse_moe.experts"
    return attention + [
        Matrix(f"{name}.{expert}.{leaf}", Kind.ROUTED_EXPERT, n, k, name, expert)
        for expert in range(experts)
        for leaf, n, k in (("w1", 256, 512), ("w3", 256, 512), ("w2", 512, 256))
    ]


LAYER = layer()


def ranks_of(matrices: list[Matrix], dense: int = 0, **by_leaf: int) -> dict[str, int]:
    return {m.name: by_leaf.get(m.name.rpartition(".")[2], 0 if m.experts else dense) for m in matrices}


def bytes_of(matrix: Matrix, rank: int) -> int:
    return resident_bytes(matrix.n, matrix.k, rank, 64, 3)


def test_a_token_reads_its_experts_and_all_of_the_rest():
    ranks = ranks_of(LAYER, dense=32, w1=16, w2=8)
    load = serving_load(held_by(LAYER, ranks, RECIPE), 2, COSTS)
    dense, one = LAYER[:4], LAYER[4:7]
    assert load.code_bytes == sum(bytes_of(m, 0) for m in dense) + 2 * sum(bytes_of(m, 0) for m in one)
    added = {m.name: bytes_of(m, ranks[m.name]) - bytes_of(m, 0) for m in (*dense, *one)}
    of_dense, of_routed = (sum(added[m.name] for m in part) for part in (dense, one))
    assert load.factor_bytes == of_dense + 2 * of_routed
    assert load.factor_cost == 2 * of_dense + 3 * 2 * of_routed
    assert load.serving_share == load.factor_cost / load.code_cost


def test_launches_are_those_of_fused_layers():
    """q, k and v are one GEMM, o another; of experts gate and up are one, down another."""
    for ranks, launches, cost in (
        (ranks_of(LAYER), 0, 0),
        (ranks_of(LAYER, k_proj=16), 1, 100),
        (ranks_of(LAYER, dense=16), 2, 200),
        (ranks_of(LAYER, dense=16, w3=16), 3, 400),
        (ranks_of(LAYER, dense=16, w1=16, w3=16, w2=16), 4, 600),
    ):
        load = serving_load(held_by(LAYER, ranks, RECIPE), 2, COSTS)
        assert (load.launches, load.launch_cost, load.layer_cost) == (launches, cost, 2 * 1000 + 5000)
        assert load.time_share == pytest.approx((load.factor_cost + cost) / (load.code_cost + 7000))
    two = [*LAYER, *layer(1)]
    assert serving_load(held_by(two, ranks_of(two, dense=16), RECIPE), 2, COSTS).launches == 4


def test_padding_is_paid_for():
    eight, sixteen = (serving_load(held_by(LAYER, ranks_of(LAYER, dense=r), RECIPE), 2) for r in (8, 16))
    assert eight == sixteen


def test_shares_of_tokens():
    shares = read_shares([*LAYER, *layer(1, experts=4)], 2)
    assert shares["model.layers.0.self_attn.q_proj"] == 1
    assert shares["model.layers.0.block_sparse_moe.experts.3.w2"] == 2 / 8
    assert shares["model.layers.1.block_sparse_moe.experts.3.w2"] == 2 / 4
    assert set(read_shares(LAYER, 99).values()) == {1.0}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_an_allowance_is_spent_by_what_the_load_says(share: float):
    """Ranks that spend a part of an allowance have that part of its share."""
    ranks = ranks_of(LAYER, dense=40, w1=24, w2=16)
    allowance = allow(LAYER, RECIPE, Target(share, 2), COSTS)
    load = serving_load(held_by(LAYER, ranks, RECIPE), 2, COSTS)
    assert allowance.spent(ranks) == pytest.approx(load.factor_cost)
    assert allowance.total == pytest.approx(share * load.code_cost)
    assert allowance.price(LAYER[:1]) == pytest.approx(2 * (bytes_of(LAYER[0], 16) - bytes_of(LAYER[0], 0)))


def test_without_a_target_anything_is_allowed():
    allowance = allow(LAYER, RECIPE, None)
    assert allowance.spent(ranks_of(LAYER, dense=512)) == 0 < allowance.total


def test_a_target_needs_the_number_of_experts():
    assert find_target(0.3, {"num_experts_per_tok": 8}) == Target(0.3, 8)
    assert find_target(0.3, {"moe_topk": [6, 6]}) == Target(0.3, 6)
    assert find_target(None, {"num_experts_per_tok": 8}) is None
    assert find_target(0.3, {}) is None


def test_the_shipped_costs_hold_for_what_they_were_measured_on():
    """Mixtral's QKV with rank 512 took 15.3 microseconds on an H100 in place of 10.4, Qwen3's 11.9 in place of 8.0."""
    costs = shipped_costs()
    for widths, k, without, added in (((4096, 1024, 1024), 4096, 10.36, 4.96), ((4096, 512, 512), 2048, 8.03, 3.83)):
        parts = zip(("q_proj", "k_proj", "v_proj"), widths, strict=True)
        matrices = [Matrix(f"a.self_attn.{leaf}", Kind.ATTENTION, n, k) for leaf, n in parts]
        load = serving_load(held_by(matrices, ranks_of(matrices, dense=512), RECIPE), 1, costs)
        assert load.time_share == pytest.approx(added / without, rel=0.06)
    assert costs.dense.factor_byte > costs.dense.code_byte > 0


def test_the_line_says_what_the_numbers_do():
    said = {
        "code_bytes": 2**20,
        "factor_bytes": 2**20 // 3,
        "launches": 3,
        "serving_share": 0.25,
        "time_share": 0.157,
    }
    assert serving_line(said) == (
        "a token alone reads 1.3 MiB, 25.0% of it compensators: serving share 0.250, predicted time +16%"
    )
