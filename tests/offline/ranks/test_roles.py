"""Ranks within a byte budget, by what a matrix is part of."""

from __future__ import annotations

import pytest

from vllm_milo.kernels.resident import BLOCK
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import DENSE_KINDS, Kind, Matrix, Recipe
from vllm_milo.offline.ranks.budget import least_bits, rank_bits, stored_bits
from vllm_milo.offline.ranks.roles import largest_rank, share_budget
from vllm_milo.offline.served.load import held_by, serving_load
from vllm_milo.offline.served.target import Target

RECIPE = Recipe(group_size=128)
HALF = BLOCK // 2


def model(
    hidden: int = 1024, inner: int = 512, shared: int = 1024, ffn: int = 2048, experts: int = 8, values: int = 256
) -> list[Matrix]:
    """Two layers: attention in both, a dense FFN in the first (0 for none), experts in the second."""
    matrices = []
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for leaf, rows in (("q_proj", hidden), ("k_proj", values), ("v_proj", values), ("o_proj", hidden)):
            matrices.append(Matrix(f"{prefix}.self_attn.{leaf}", Kind.ATTENTION, rows, hidden))

    def add(name: str, kind: Kind, size: int, experts: str | None = None, expert: int | None = None) -> None:
        for leaf, n, k in (("gate_proj", size, hidden), ("up_proj", size, hidden), ("down_proj", hidden, size)):
            matrices.append(Matrix(f"{name}.{leaf}", kind, n, k, experts, expert))

    if ffn:
        add("model.layers.0.mlp", Kind.DENSE_FFN, ffn)
    if shared:
        add("model.layers.1.mlp.shared_expert", Kind.SHARED_EXPERT, shared)
    for expert in range(experts):
        name = "model.layers.1.mlp.experts"
        add(f"{name}.{expert}", Kind.ROUTED_EXPERT, inner, name, expert)
    return matrices


MODELS = {
    "all kinds": model(),
    "no dense FFN": model(ffn=0),
    "no shared expert": model(ffn=0, shared=0),
    "many experts": model(experts=64, inner=256),
    "ragged": model(hidden=896, inner=384, shared=4864, ffn=0, values=128, experts=12),
    "dense only": model(experts=0),
    "tiny": model(hidden=128, inner=128, shared=128, ffn=128, experts=4, values=64),
    "routed only": [matrix for matrix in model() if matrix.kind is Kind.ROUTED_EXPERT],
}


def bits(matrices: list[Matrix], ranks: dict[str, int], recipe: Recipe = RECIPE) -> float:
    return stored_bits(matrices, ranks, recipe)


def may_grow(matrices: list[Matrix], ranks: dict[str, int]) -> list[Matrix]:
    """Matrices that every token passes with room for one step more."""
    return [matrix for matrix in matrices if matrix.kind in DENSE_KINDS and ranks[matrix.name] < largest_rank(matrix)]


def is_step(rank: int) -> bool:
    """Whole blocks, and half of the first one."""
    return rank % BLOCK == 0 or rank == HALF


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("factor_bits", [3, 8, 16])
@pytest.mark.parametrize("budget", [3.26, 3.3, 3.6, 4.1])
def test_budget_is_kept_and_no_step_more_would_fit(name: str, budget: float, factor_bits: int):
    matrices, recipe = MODELS[name], Recipe(group_size=128, factor_bits=factor_bits)
    ranks, _ = share_budget(matrices, budget, recipe)
    assert ranks.keys() == {matrix.name for matrix in matrices}
    stored = bits(matrices, ranks, recipe)
    assert stored <= budget + 1e-9
    weights = sum(matrix.n * matrix.k for matrix in matrices)
    for matrix in may_grow(matrices, ranks):
        assert stored + BLOCK * rank_bits(matrix, factor_bits) / weights > budget - 1e-9, matrix.name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [3.25, 3.3, 3.6, 4.5, 9.0])
def test_ranks_are_steps_of_16_within_their_limits(name: str, budget: float):
    matrices = MODELS[name]
    ranks, _ = share_budget(matrices, budget, RECIPE)
    for matrix in matrices:
        assert is_step(ranks[matrix.name])
        assert 0 <= ranks[matrix.name] <= largest_rank(matrix) <= min(matrix.n, matrix.k)
    if budget == 9:  # more than all of them take
        assert all(ranks[m.name] == largest_rank(m) for m in matrices)


@pytest.mark.parametrize("name", ["all kinds", "no dense FFN", "no shared expert", "many experts", "ragged"])
def test_what_every_token_passes_gets_most(name: str):
    matrices = MODELS[name]
    ranks, warnings = share_budget(matrices, 3.6, RECIPE)
    assert warnings == []
    routed = [ranks[matrix.name] for matrix in matrices if matrix.kind is Kind.ROUTED_EXPERT]
    dense = [m for m in matrices if m.kind in DENSE_KINDS]
    assert max(routed) - min(routed) <= BLOCK
    for matrix in dense:
        assert ranks[matrix.name] > 4 * min(routed) or matrix not in may_grow(dense, ranks)


def test_limits_are_what_serving_bears():
    """Of Mixtral's sizes: attention an eighth of its larger side, keys all, a routed expert half of its smaller one."""
    for leaf, n, limit in (("q_proj", 4096, 512), ("k_proj", 1024, 1024), ("w1", 14336, 2048)):
        kind = Kind.ROUTED_EXPERT if leaf == "w1" else Kind.ATTENTION
        assert largest_rank(Matrix(leaf, kind, n, 4096)) == limit
    assert largest_rank(Matrix("k_proj", Kind.ATTENTION, 128, 896)) == 128
    assert largest_rank(Matrix("q_proj", Kind.ATTENTION, 128, 128)) == 64


def test_keys_and_values_of_many_heads_get_twice_the_rank():
    ranks, _ = share_budget(MODELS["all kinds"], 3.4, RECIPE)
    by_leaf = {leaf: ranks[f"model.layers.1.self_attn.{leaf}"] for leaf in ("q_proj", "k_proj", "v_proj")}
    assert by_leaf["k_proj"] == by_leaf["v_proj"]
    assert 2 * by_leaf["q_proj"] <= by_leaf["k_proj"] <= 2 * by_leaf["q_proj"] + 2 * BLOCK
    assert by_leaf["k_proj"] < 256  # so the limit did not decide
    ranks, _ = share_budget(MODELS["tiny"], 9.0, RECIPE)
    assert ranks["model.layers.0.self_attn.k_proj"] == 64  # full


def test_more_budget_never_takes_from_routed_experts():
    matrices, before = MODELS["all kinds"], 0
    name = "model.layers.1.mlp.experts.0.up_proj"
    for budget in (3.3, 3.5, 3.7, 3.9, 4.2, 5.0):
        after = share_budget(matrices, budget, RECIPE)[0][name]
        assert after >= before
        before = after
    assert before > 0


def test_only_routed_experts_share_what_there_is():
    ranks, _ = share_budget(MODELS["routed only"], 3.6, RECIPE)
    least = min(ranks.values())
    assert least > 0
    more = {name for name, rank in ranks.items() if rank > least}
    assert all(ranks[name] == least + BLOCK for name in more)
    assert all(name.endswith("down_proj") for name in more)


@pytest.mark.parametrize(("share", "raised_layers"), [(0.9, 0), (1.1, 1), (2.1, 2)])
def test_less_than_a_step_of_all_experts_goes_to_down_projections_of_whole_layers(share: float, raised_layers: int):
    """``share`` is what the budget leaves beyond the base, in steps of the down projections of one layer."""
    first = MODELS["routed only"]
    second = [
        m._replace(name=m.name.replace("layers.1", "layers.2"), experts="model.layers.2.mlp.experts") for m in first
    ]
    matrices = [*first, *second]
    price = sum(rank_bits(matrix, 3) for matrix in first if matrix.name.endswith("down_proj")) * HALF
    weights = sum(matrix.n * matrix.k for matrix in matrices)
    budget = least_bits(matrices, RECIPE) + share * price / weights
    ranks, _ = share_budget(matrices, budget, RECIPE)
    raised = {name for name, rank in ranks.items() if rank}
    assert {ranks[name] for name in raised} <= {HALF}
    assert len(raised) == raised_layers * sum(matrix.name.endswith("down_proj") for matrix in first)
    assert all(name.endswith("down_proj") for name in raised)
    assert len({name.split(".mlp")[0] for name in raised}) == raised_layers


@pytest.mark.parametrize(("group", "least"), [(32, "4"), (64, "3.5"), (128, "3.25")])
def test_a_budget_below_the_base_is_refused(group: int, least: str):
    budget = float(least) - 0.05
    advice = "raise the budget$" if group == 128 else "raise the budget or --group-size$"
    said = rf"--budget-bits {budget:g}: .* group size {group} take {least} bits a weight already; {advice}"
    with pytest.raises(ConversionError, match=said):
        share_budget(MODELS["all kinds"], budget, Recipe(group_size=group))


def test_sizes_that_128_does_not_divide_cost_only_their_own_matrices():
    """A dense FFN in groups of 64 leaves more to ranks than a whole model would."""
    odd = model(ffn=1984)
    ranks, _ = share_budget(odd, 3.6, RECIPE)
    assert bits(odd, ranks) <= 3.6
    coarse, _ = share_budget(odd, 3.6, Recipe(group_size=64))
    assert sum(ranks.values()) > 1.5 * sum(coarse.values())
    with pytest.raises(ConversionError, match=r"of group sizes 128 and 64 take 3\.2\d+ bits a weight already"):
        share_budget(odd, 3.25, RECIPE)


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_that_only_pays_for_the_base_warns(name: str):
    ranks, warnings = share_budget(MODELS[name], 3.25, RECIPE)
    assert set(ranks.values()) == {0}
    (warning,) = warnings
    assert warning.startswith("--budget-bits 3.25 leaves nothing for compensators: codes, scales and zero points")


def test_sizes_too_small_for_any_rank_warn():
    matrices = [Matrix("q_proj", Kind.ATTENTION, 4, 128), Matrix("o_proj", Kind.ATTENTION, 128, 4)]
    ranks, warnings = share_budget(matrices, 9.0, RECIPE)
    assert set(ranks.values()) == {0}
    assert len(warnings) == 1


def share(matrices: list[Matrix], ranks: dict[str, int]) -> float:
    return serving_load(held_by(matrices, ranks, RECIPE), TOP_K).serving_share


TOP_K = 2


@pytest.mark.parametrize("name", ["all kinds", "no dense FFN", "many experts", "dense only", "routed only"])
@pytest.mark.parametrize("most", [0.05, 0.2, 0.5, 0.9])
def test_a_target_is_kept_beside_the_budget(name: str, most: float):
    matrices = MODELS[name]
    free, _ = share_budget(matrices, 3.6, RECIPE)
    ranks, _ = share_budget(matrices, 3.6, RECIPE, Target(most, TOP_K))
    assert bits(matrices, ranks) <= 3.6 + 1e-9
    if share(matrices, free) <= most:
        assert ranks == free
    else:
        assert 0 < share(matrices, ranks) <= most
        assert all(is_step(ranks[matrix.name]) for matrix in matrices)


def test_what_every_token_passes_gives_way_to_routed_experts():
    """A token reads 2 of 64 experts: the same bits cost a sixteenth as much there, and are spent all the same."""
    matrices = MODELS["many experts"]
    free, _ = share_budget(matrices, 3.6, RECIPE)
    ranks, _ = share_budget(matrices, 3.6, RECIPE, Target(0.7 * share(matrices, free), TOP_K))
    for matrix in matrices:
        if matrix.kind is Kind.ROUTED_EXPERT:
            assert ranks[matrix.name] >= free[matrix.name]
        else:
            assert ranks[matrix.name] <= free[matrix.name]
    routed = [m.name for m in matrices if m.kind is Kind.ROUTED_EXPERT]
    assert sum(ranks[name] for name in routed) > sum(free[name] for name in routed)
    step = BLOCK * sum(rank_bits(m, 3) for m in matrices if m.name.endswith("down_proj") and m.name in routed)
    assert bits(matrices, ranks) + step / sum(m.n * m.k for m in matrices) > 3.6


def test_a_target_without_room_for_a_step_leaves_no_ranks():
    ranks, warnings = share_budget(MODELS["dense only"], 3.6, RECIPE, Target(1e-6, TOP_K))
    assert set(ranks.values()) == {0}
    (warning,) = warnings
    assert warning.startswith("--serving-share 1e-06 leaves nothing for compensators")
