"""Ranks within a layer by what its roles need."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from vllm_milo.kernels.resident import BLOCK
from vllm_milo.offline.nouns import Kind, Matrix, Recipe
from vllm_milo.offline.ranks import need
from vllm_milo.offline.ranks.budget import rank_bits
from vllm_milo.offline.ranks.need import Need, group_roles, probe_ranks, share_by_need, share_left
from vllm_milo.offline.ranks.roles import largest_rank
from vllm_milo.offline.served.target import Allowance, Target, allow

ATTENTION = "model.layers.3.self_attn"
EXPERTS = "model.layers.3.mlp.experts"
FALLING = {8: 0.7, 32: 0.4, 128: 0.2}


def layer(experts: int = 4) -> list[Matrix]:
    dense = [Matrix(f"{ATTENTION}.{leaf}", Kind.ATTENTION, 512, 512) for leaf in ("q_proj", "o_proj")]
    narrow = [Matrix(f"{ATTENTION}.v_proj", Kind.ATTENTION, 64, 512)]
    routed = [
        Matrix(f"{EXPERTS}.{expert}.{leaf}", Kind.ROUTED_EXPERT, n, k, EXPERTS, expert)
        for expert in range(experts)
        for leaf, n, k in (("gate_proj", 128, 512), ("up_proj", 128, 512), ("down_proj", 512, 128))
    ]
    return [*dense, *narrow, *routed]


ROLES = group_roles(layer())
STEP = BLOCK * rank_bits(ROLES[f"{ATTENTION}.q_proj"][0], 3)


def spent(ranks: dict[str, int], factor_bits: int = 3) -> float:
    return sum(ranks[role] * rank_bits(matrix, factor_bits) for role, of in ROLES.items() for matrix in of)


def needs(**damage: float) -> dict[str, Need]:
    """Equal needs but for those named by their leaf."""
    return {role: Need(damage.get(role.rpartition(".")[2], 1.0), FALLING) for role in ROLES}


def test_a_role_is_a_linear_layer_or_a_projection_of_all_experts():
    assert {role: len(of) for role, of in ROLES.items()} == {
        f"{ATTENTION}.q_proj": 1,
        f"{ATTENTION}.o_proj": 1,
        f"{ATTENTION}.v_proj": 1,
        f"{EXPERTS}.gate_proj": 4,
        f"{EXPERTS}.up_proj": 4,
        f"{EXPERTS}.down_proj": 4,
    }
    assert sorted(matrix for of in ROLES.values() for matrix in of) == sorted(layer())


@pytest.mark.parametrize("bits", [0, STEP - 1, STEP, 7.5 * STEP, 33 * STEP, 1e9])
@pytest.mark.parametrize("factor_bits", [3, 16])
def test_no_more_is_spent_than_there_is_and_no_step_more_would_fit(bits: float, factor_bits: int):
    ranks = share_by_need(ROLES, needs(q_proj=3.0, down_proj=20.0), bits, factor_bits)
    left = bits - spent(ranks, factor_bits)
    assert left >= 0
    for role, of in ROLES.items():
        assert ranks[role] % BLOCK == 0
        assert ranks[role] <= largest_rank(of[0])
        step = BLOCK * sum(rank_bits(matrix, factor_bits) for matrix in of)
        assert ranks[role] + BLOCK > largest_rank(of[0]) or step > left


def test_the_needier_role_gets_more():
    ranks = share_by_need(ROLES, needs(o_proj=8.0, gate_proj=1e-6, up_proj=1e-6, down_proj=1e-6), 10 * STEP, 3)
    assert ranks[f"{ATTENTION}.o_proj"] > ranks[f"{ATTENTION}.q_proj"] > 0
    assert ranks[f"{EXPERTS}.up_proj"] == 0


def test_of_equal_needs_the_cheaper_one_gets_more():
    ranks = share_by_need(ROLES, needs(), 6 * STEP, 3)
    assert ranks[f"{ATTENTION}.v_proj"] >= ranks[f"{ATTENTION}.q_proj"] >= ranks[f"{ATTENTION}.o_proj"] > 0
    assert ranks[f"{ATTENTION}.v_proj"] > ranks[f"{ATTENTION}.o_proj"]


def test_what_ranks_take_counts_beside_the_damage():
    found = needs()
    found[f"{ATTENTION}.q_proj"] = Need(1.0, {8: 0.2, 64: 0.1})
    ranks = share_by_need(ROLES, found, STEP, 3)
    assert ranks[f"{ATTENTION}.q_proj"] == BLOCK


def test_one_projection_of_the_experts_may_get_ranks_alone():
    ranks = share_by_need(ROLES, needs(down_proj=100.0), 4 * STEP, 3)
    assert ranks[f"{EXPERTS}.down_proj"] > 0
    assert ranks[f"{EXPERTS}.gate_proj"] == ranks[f"{EXPERTS}.up_proj"] == 0


def test_a_role_that_nothing_is_known_of_gets_nothing():
    found = needs()
    del found[f"{ATTENTION}.q_proj"]
    assert share_by_need(ROLES, found, 1e9, 3)[f"{ATTENTION}.q_proj"] == 0


def test_the_share_left_is_what_was_measured_and_falls_ever_less():
    assert share_left(FALLING, 0) == 1
    for rank, share in FALLING.items():
        assert math.isclose(share_left(FALLING, rank), share)
    assert math.isclose(share_left(FALLING, 20), math.sqrt(0.7 * 0.4))
    shares = [share_left(FALLING, rank) for rank in range(0, 400, 8)]
    taken = [before - after for before, after in pairwise(shares)]
    assert taken == sorted(taken, reverse=True)
    assert min(taken) > 0


def test_measurements_out_of_order_still_make_a_curve_that_falls_ever_less():
    for left in ({8: 0.9, 32: 0.1}, {8: 0.5, 32: 0.6, 64: 0.2}, {8: 1.1}, {8: 0.0, 16: 0.0}):
        shares = [share_left(left, rank) for rank in range(0, 200, 8)]
        taken = [before - after for before, after in pairwise(shares)]
        assert all(a >= b >= 0 for a, b in pairwise(taken)), left


@pytest.mark.parametrize("planned", [0, 8, 24, 64, 512])
@pytest.mark.parametrize("matrix", [of[0] for of in ROLES.values()], ids=lambda matrix: matrix.name)
def test_probes_begin_with_the_first_step_and_keep_the_limit(matrix: Matrix, planned: int):
    ranks = probe_ranks(matrix, planned)
    assert ranks[0] == BLOCK
    assert ranks == sorted(set(ranks))
    assert all(rank % BLOCK == 0 for rank in ranks)
    assert ranks[-1] == min(largest_rank(matrix), max(4 * planned, 32)) // BLOCK * BLOCK


def test_sizes_too_small_for_any_rank_are_not_tried():
    assert probe_ranks(Matrix("q_proj", Kind.ATTENTION, 4, 128), 8) == []
    assert probe_ranks(Matrix("q_proj", Kind.ATTENTION, 8, 128), 8) == []


LAYER = layer(experts=16)
RECIPE = Recipe(group_size=64)


def served(ranks: dict[str, int], roles: dict[str, list[Matrix]], allowance: Allowance) -> float:
    return sum(ranks[role] / BLOCK * allowance.price(of) for role, of in roles.items())


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3])
def test_ranks_cost_no_more_in_serving_than_they_may_and_leave_no_more_error_than_bits_alone_would(share: float):
    """Against buying by bits alone until what serving allows is spent."""
    roles = group_roles(LAYER)
    found = {role: Need(4.0 if "proj" in role and ".experts" not in role else 1.0, FALLING) for role in roles}
    bits = 40 * STEP
    allowance = allow(LAYER, RECIPE, Target(share, 2))
    free = share_by_need(roles, found, bits, 3)
    ranks = share_by_need(roles, found, bits, 3, allowance)
    assert served(ranks, roles, allowance) <= allowance.total
    assert sum(ranks[role] * rank_bits(m, 3) for role, of in roles.items() for m in of) <= bits
    if served(free, roles, allowance) <= allowance.total:
        assert ranks == free
    else:
        assert ranks != free
        by_bits = need._buy(roles, found, [need._Purse(*purse) for purse in purses(roles, bits, allowance)], [1, 0])
        assert need._damage(found, ranks) <= need._damage(found, by_bits)


def purses(roles: dict[str, list[Matrix]], bits: float, allowance: Allowance) -> list[tuple[dict[str, float], float]]:
    stored = {role: BLOCK * sum(rank_bits(matrix, 3) for matrix in of) for role, of in roles.items()}
    return [(stored, bits), ({role: allowance.price(of) for role, of in roles.items()}, allowance.total)]


def test_near_full_rank_must_earn_what_it_costs():
    """Values bring almost nothing past rank 16 here, and experts of which a token reads few still do."""
    roles = group_roles(LAYER)
    found = {role: Need(1e-6, FALLING) for role in roles}
    found[f"{ATTENTION}.v_proj"] = Need(10.0, {16: 0.05, 32: 0.049, 64: 0.048})
    found[f"{EXPERTS}.down_proj"] = Need(10.0, {16: 0.9, 32: 0.81, 64: 0.66})
    allowance = allow(LAYER, RECIPE, Target(0.1, 2))
    bits = 200 * STEP
    assert share_by_need(roles, found, bits, 3)[f"{ATTENTION}.v_proj"] == 64  # full: bits alone do not mind
    ranks = share_by_need(roles, found, bits, 3, allowance)
    assert 16 <= ranks[f"{ATTENTION}.v_proj"] < 64
    assert ranks[f"{EXPERTS}.down_proj"] > 0
