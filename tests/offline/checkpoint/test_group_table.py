"""Which group sizes a checkpoint's table names, and how compactly."""

from __future__ import annotations

import pytest

from vllm_milo.checkpoint import GroupTable, MiLoFormat
from vllm_milo.offline.checkpoint.matrices import group_table
from vllm_milo.offline.nouns import Kind, Matrix, Recipe

RECIPE = Recipe(group_size=128)


def linear(sizes: dict[str, int]) -> list[Matrix]:
    """Matrices of some input sizes."""
    return [Matrix(name, Kind.ATTENTION, 64, k) for name, k in sizes.items()]


def experts(layer: str, hidden: int, inner: int) -> list[Matrix]:
    """Two experts of a layer."""
    name = f"{layer}.mlp.experts"
    sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return [
        Matrix(f"{name}.{index}.{leaf}", Kind.ROUTED_EXPERT, n, k, name, index)
        for index in range(2)
        for leaf, (n, k) in sizes.items()
    ]


L0, L1, L2 = (f"model.layers.{number}" for number in range(3))
CASES = {
    "all fit": (linear({f"{L0}.q": 256, f"{L1}.q": 256}), 128, {}, {}),
    "all need smaller": (linear({f"{L0}.q": 192, f"{L1}.q": 320}), 64, {}, {}),
    "in every layer": (
        linear({f"{L0}.q": 192, f"{L0}.o": 256, f"{L1}.q": 192, f"{L1}.o": 256}),
        128,
        {r"re:.*\.layers\.\d+\.q": 64},
        {},
    ),
    # DeepSeek-V2-Lite: its first layer has a dense FFN of 10944
    "in one layer": (
        linear({f"{L0}.mlp.down_proj": 10944, f"{L1}.mlp.shared_experts.down_proj": 2816}),
        128,
        {f"{L0}.mlp.down_proj": 64},
        {},
    ),
    "in some layers": (
        linear({f"{L0}.q": 192, f"{L1}.q": 192, f"{L2}.q": 256}),
        128,
        {f"{L0}.q": 64, f"{L1}.q": 64},
        {},
    ),
    "two smaller sizes": (
        linear({f"{L0}.q": 192, f"{L1}.q": 160, f"{L2}.q": 256}),
        128,
        {f"{L0}.q": 64, f"{L1}.q": 32},
        {},
    ),
    "outside the layers": (linear({"a.b.q": 192, "q": 256}), 128, {"a.b.q": 64}, {}),
    "experts": (
        experts(L0, 256, 192) + experts(L1, 256, 192),
        128,
        {},
        {r"re:.*\.layers\.\d+\.mlp\.experts": {"down_proj": 64}},
    ),
    "experts of one layer": (
        experts(L0, 256, 128) + experts(L1, 192, 128),
        128,
        {},
        {f"{L1}.mlp.experts": {"gate_proj": 64, "up_proj": 64}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_only_exceptions_are_named_and_every_matrix_finds_its_own(name: str):
    matrices, size, modules, by_experts = CASES[name]
    assert group_table(matrices, RECIPE) == (size, GroupTable(modules, by_experts))
    fmt = MiLoFormat(size, groups=GroupTable(modules, by_experts))
    read = MiLoFormat.from_dict(fmt.to_dict())
    for matrix in matrices:
        assert read.module_group_size(matrix.name) == RECIPE.group_size_for(matrix.k)
