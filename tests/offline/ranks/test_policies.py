import pytest

from vllm_milo.offline.checkpoint.matrices import rank_table
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Kind, Matrix
from vllm_milo.offline.ranks.policies import Policy, Statistics, assign_ranks, parse_policies, share_ranks


def model(experts: int = 4, layers: int = 2, n: int = 256, k: int = 512):
    matrices = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        matrices.append(Matrix(f"{prefix}.self_attn.q_proj", Kind.ATTENTION, k, k))
        matrices.append(Matrix(f"{prefix}.mlp.shared_expert.up_proj", Kind.SHARED_EXPERT, n, k))
        name = f"{prefix}.mlp.experts"
        for expert in range(experts):
            for projection, shape in (("gate_proj", (n, k)), ("up_proj", (n, k)), ("down_proj", (k, n))):
                matrices.append(Matrix(f"{name}.{expert}.{projection}", Kind.ROUTED_EXPERT, *shape, name, expert))
    return matrices


MODEL = model()
ROUTED = [matrix.name for matrix in MODEL if matrix.kind is Kind.ROUTED_EXPERT]
KURTOSIS = Statistics(kurtosis={name: 0.1 * index for index, name in enumerate(ROUTED)})


def assigned(text, statistics=KURTOSIS, matrices=MODEL):
    return assign_ranks(parse_policies(text), matrices, statistics)


def test_parse():
    assert parse_policies("dense=512, kurtosis=16") == [Policy("dense", 512), Policy("kurtosis", 16)]
    assert parse_policies("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("desne=8", "unknown policy 'desne'"),
        ("dense", "needs a rank above 0"),
        ("dense=0", "needs a rank above 0"),
        ("dense=-8", "needs a rank above 0"),
        ("kurtosis-paper=24", "ranks 16 and 32"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ConversionError, match=message):
        parse_policies(text)


def test_uniform_dense_and_sparse():
    assert set(assigned("uniform=16")[0].values()) == {16}
    dense = assigned("dense=64")[0]
    assert dense["model.layers.0.self_attn.q_proj"] == dense["model.layers.1.mlp.shared_expert.up_proj"] == 64
    assert all(dense[name] == 0 for name in ROUTED)
    sparse = assigned("sparse=16")[0]
    assert all(sparse[name] == 16 for name in ROUTED)
    assert sparse["model.layers.0.self_attn.q_proj"] == 0


def test_policies_add_up():
    ranks = assigned("uniform=8,dense=64,sparse=16")[0]
    assert ranks["model.layers.0.self_attn.q_proj"] == 72
    assert ranks[ROUTED[0]] == 24


@pytest.mark.parametrize(("rank", "rounded"), [(1, 8), (11, 8), (12, 16), (100, 104)])
def test_ranks_are_multiples_of_8(rank, rounded):
    assert set(assigned(f"uniform={rank}")[0].values()) == {rounded}


def test_cap_warns():
    ranks, warnings = assigned("dense=1000")
    assert ranks["model.layers.0.self_attn.q_proj"] == 512
    assert ranks["model.layers.0.mlp.shared_expert.up_proj"] == 256
    assert len(warnings) == 1
    assert "min(N, K)" in warnings[0]
    assert "1000 -> 512" in warnings[0]


@pytest.mark.parametrize("rank", [8, 16, 30, 64])
def test_kurtosis_has_the_mean_and_is_monotone(rank):
    ranks = assigned(f"kurtosis={rank}")[0]
    values = [ranks[name] for name in ROUTED]
    assert sum(values) / len(values) == pytest.approx(rank, abs=8 / len(values))
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_one_outlier_does_not_take_all_ranks():
    statistics = Statistics(kurtosis={name: 100.0 if index == 5 else 0.0 for index, name in enumerate(ROUTED)})
    ranks = assigned("kurtosis=64", statistics)[0]
    assert ranks[ROUTED[5]] == 256
    assert min(ranks[name] for name in ROUTED) >= 48


def test_kurtosis_of_the_release():
    values = [0.4, 0.6, 1.4, 3.2, 9.0, 9.6, 23.25]
    statistics = Statistics(kurtosis=dict.fromkeys(ROUTED, 0.0) | dict(zip(ROUTED, values, strict=False)))
    big = model(n=8192, k=8192)
    found = [assign_ranks(parse_policies("kurtosis-paper=16"), big, statistics)[0][name] for name in ROUTED[:7]]
    assert found == [0, 8, 8, 32, 2048, 1024, 1024]
    assert assign_ranks(parse_policies("kurtosis-paper=32"), big, statistics)[0][ROUTED[3]] == 64


def test_frequency_follows_use_in_each_layer():
    counts = {"model.layers.0.mlp.experts": [10, 20, 30, 40], "model.layers.1.mlp.experts": [0, 0, 50, 50]}
    ranks = assigned("frequency=40", Statistics(expert_counts=counts))[0]
    assert [ranks[f"model.layers.0.mlp.experts.{e}.up_proj"] for e in range(4)] == [16, 32, 48, 64]
    assert [ranks[f"model.layers.1.mlp.experts.{e}.down_proj"] for e in range(4)] == [0, 0, 80, 80]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "need expert counts of model.layers.0.mlp.experts; make them with `milo stats"),
        ({"model.layers.0.mlp.experts": [1, 2]}, "expected 4 counts"),
        ({"model.layers.0.mlp.experts": [0, 0, 0, 0]}, "not all 0"),
    ],
)
def test_bad_counts(counts, message):
    with pytest.raises(ConversionError, match=message):
        assigned("frequency=16", Statistics(expert_counts=counts))


def test_shares_respect_limits_and_the_total():
    shares = share_ranks({"a": 100.0, "b": 1.0, "c": 1.0}, 32, {"a": 40, "b": 1000, "c": 1000})
    assert shares == {"a": 40.0, "b": 32.0, "c": 24.0}
    assert share_ranks({"a": 1.0, "b": 1.0}, 64, {"a": 8, "b": 8}) == {"a": 8.0, "b": 8.0}


def test_rank_table_is_compact():
    ranks = assigned("dense=64,kurtosis=16")[0]
    uniform = rank_table(MODEL, assigned("sparse=16")[0])
    assert uniform.experts["model.layers.0.mlp.experts"] == {"gate_proj": 16, "up_proj": 16, "down_proj": 16}
    assert uniform.modules == {}
    table = rank_table(MODEL, ranks)
    for matrix in MODEL:
        if matrix.experts is None:
            assert table.of_module(matrix.name) == ranks[matrix.name]
        else:
            projection = matrix.name.rpartition(".")[2]
            assert table.of_experts(matrix.experts, projection, 4)[matrix.expert] == ranks[matrix.name]
