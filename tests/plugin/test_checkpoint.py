import pytest

from vllm_milo.checkpoint import CheckpointError, GroupTable, MiLoFormat, RankTable, split_expert_name
from vllm_milo.names import find_key

CONFIG = {
    "quant_method": "milo",
    "format_version": 1,
    "bits": 3,
    "group_size": 64,
    "zero_point": "real",
    "compensator": {"bits": 3, "group_size": 64},
    "ranks": {
        "default": 8,
        "modules": {"model.layers.0.self_attn.q_proj": 512, "re:.*o_proj": 256, "re:.*layers\\.1.*": 32},
        "experts": {"model.layers.0.mlp.experts": {"gate_proj": 16, "down_proj": [16, 32, 0, 64]}},
    },
    "ignore": ["lm_head", "re:.*\\.gate$"],
    "recipe": {"method": "paper"},
}


def changed(**changes):
    return {**CONFIG, **changes}


def test_round_trip():
    fmt = MiLoFormat.from_dict(CONFIG)
    assert fmt.to_dict() == CONFIG
    assert MiLoFormat.from_dict(fmt.to_dict()) == fmt


def test_ranks_of_modules():
    ranks = MiLoFormat.from_dict(CONFIG).ranks
    assert ranks.of_module("model.layers.0.self_attn.q_proj") == 512
    assert ranks.of_module("model.layers.0.self_attn.o_proj") == 256
    assert ranks.of_module("model.layers.1.self_attn.o_proj") == 32  # the last matching pattern wins
    assert ranks.of_module("model.layers.0.self_attn.k_proj") == 8


def test_exact_name_beats_patterns():
    table = {"re:.*q_proj": 1, "a.q_proj": 2, "re:a.*": 3}
    assert find_key(table, "a.q_proj") == "a.q_proj"
    assert find_key(table, "a.k_proj") == "re:a.*"
    assert find_key(table, "b.k_proj") is None


def test_patterns_match_the_full_name():
    fmt = MiLoFormat.from_dict(changed(ignore=["re:gate", "lm_head"]))
    assert not fmt.ignores("model.layers.0.mlp.gate")
    assert not fmt.ignores("model.lm_head")
    assert fmt.ignores("lm_head")


def test_ranks_of_experts():
    ranks = MiLoFormat.from_dict(CONFIG).ranks
    experts = "model.layers.0.mlp.experts"
    assert ranks.of_experts(experts, "gate_proj", 4) == [16] * 4
    assert ranks.of_experts(experts, "down_proj", 4) == [16, 32, 0, 64]
    assert ranks.of_experts(experts, "up_proj", 4) == [8] * 4
    assert ranks.of_experts("model.layers.5.mlp.experts", "up_proj", 2) == [8, 8]
    with pytest.raises(CheckpointError, match=r"lists 4 ranks, but model\.layers\.0\.mlp\.experts has 8 experts"):
        ranks.of_experts(experts, "down_proj", 8)


def test_expert_names():
    assert split_expert_name("model.layers.0.mlp.experts.12.w1") == ("model.layers.0.mlp.experts", 12, "w1")
    assert split_expert_name("model.layers.0.mlp.shared_expert.gate_proj") is None


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, {}),
        (
            16,
            {
                "weight_u": ("I32", (16, 12)),
                "weight_u_scale": ("F16", (16, 2)),
                "weight_v": ("I32", (16, 24)),
                "weight_v_scale": ("F16", (16, 4)),
            },
        ),
    ],
)
def test_tensors(rank, expected):
    fmt = MiLoFormat.from_dict(CONFIG)
    assert fmt.base_tensors(128, 256, 64) == {
        "weight_packed": ("I32", (128, 24)),
        "weight_scale": ("F16", (128, 4)),
        "weight_zero": ("F16", (128, 4)),
    }
    assert fmt.factor_tensors(128, 256, rank, "BF16") == expected


def test_factors_of_8_and_16_bits():
    eight = MiLoFormat.from_dict(changed(compensator={"bits": 8})).factor_tensors(128, 256, 8, "BF16")
    assert eight["weight_v"] == ("I8", (8, 256))
    assert eight["weight_v_scale"] == ("F16", (8, 4))
    sixteen = MiLoFormat.from_dict(changed(compensator={"bits": 16})).factor_tensors(128, 256, 8, "BF16")
    assert sixteen == {"weight_u": ("BF16", (8, 128)), "weight_v": ("BF16", (8, 256))}


GROUPS = {
    "modules": {"re:.*layers\\.\\d+\\.self_attn\\..*": 64, "model.layers.1.self_attn.o_proj": 32},
    "experts": {"re:.*\\.mlp\\.experts": {"gate_proj": 64, "up_proj": 64}, "model.layers.3.mlp.experts": {"w2": 32}},
}
MIXED = changed(group_size=128, group_sizes=GROUPS)


def test_group_sizes_round_trip():
    fmt = MiLoFormat.from_dict(MIXED)
    assert fmt.to_dict() == MIXED
    assert list(fmt.to_dict())[3:5] == ["group_size", "group_sizes"]
    assert MiLoFormat.from_dict(fmt.to_dict()) == fmt


@pytest.mark.parametrize("empty", [{}, {"modules": {}}, {"modules": {}, "experts": {}}])
def test_without_exceptions_there_are_no_group_sizes(empty: dict):
    fmt = MiLoFormat.from_dict(changed(group_sizes=empty))
    assert fmt == MiLoFormat.from_dict(CONFIG)
    assert fmt.to_dict() == CONFIG
    assert fmt.module_group_size("model.layers.0.self_attn.q_proj") == 64


def test_group_sizes_of_matrices():
    fmt = MiLoFormat.from_dict(MIXED)
    assert fmt.module_group_size("model.layers.0.self_attn.o_proj") == 64
    assert fmt.module_group_size("model.layers.1.self_attn.o_proj") == 32  # an exact name beats patterns
    assert fmt.module_group_size("model.layers.0.mlp.down_proj") == 128
    for name, size in (("0.mlp.experts.5.gate_proj", 64), ("0.mlp.experts.0.w3", 64), ("0.mlp.experts.0.w2", 128)):
        assert fmt.module_group_size(f"model.layers.{name}") == size
    assert fmt.module_group_size("model.layers.3.mlp.experts.1.down_proj") == 32
    assert fmt.module_group_size("model.layers.3.mlp.experts.1.up_proj") == 128
    assert fmt.base_tensors(128, 192, 64)["weight_scale"] == ("F16", (128, 3))


def test_fused_layers_need_one_group_size():
    fmt = MiLoFormat(128, groups=GroupTable({"a.q_proj": 64, "a.k_proj": 64}))
    assert fmt.fused_group_size(["a.q_proj", "a.k_proj"]) == 64
    with pytest.raises(CheckpointError, match=r"one group size: a\.q_proj has 64, a\.k_proj has 64, a\.v_proj has 128"):
        fmt.fused_group_size(["a.q_proj", "a.k_proj", "a.v_proj"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(format_version=2), r"format_version is 2; .* reads 1: upgrade vllm-milo"),
        ({k: v for k, v in CONFIG.items() if k != "format_version"}, "no format_version"),
        (changed(bits=4), r"bits is 4; format_version 1 has 3"),
        (changed(zero_point="int"), r"zero_point is 'int'"),
        (changed(group_size=48), r"group_size is 48; supported are \(32, 64, 128\)"),
        (changed(compensator={"bits": 5}), r"compensator\.bits is 5"),
        (changed(compensator={"bits": 3, "group_size": 32}), r"compensator\.group_size is 32"),
        (changed(compensator={"bit": 3}), r"unknown key compensator\.bit"),
        (changed(desc_act=True), r"unknown key desc_act"),
        (changed(ranks={"default": -1}), r"ranks\.default must be a rank >= 0"),
        (changed(ranks={"modules": {"a": "8"}}), r"ranks\.modules\['a'\]"),
        (changed(ranks={"experts": {"a": {"gate": 8}}}), r"\['gate'\]: unknown projection"),
        (changed(ranks={"experts": {"a": {"w1": [8, 2.5]}}}), r"found 2\.5"),
        (changed(group_sizes={"modules": {"a": 48}}), r"group_sizes\.modules\['a'\] is 48; supported are \(32,"),
        (changed(group_sizes={"modules": {"a": "64"}}), r"group_sizes\.modules\['a'\] is '64'"),
        (changed(group_sizes={"experts": {"a": {"gate": 32}}}), r"group_sizes.*\['gate'\]: unknown projection"),
        (changed(group_sizes={"experts": {"a": {"w2": [32, 64]}}}), r"\['w2'\] is \[32, 64\]; supported"),
        (changed(group_sizes={"experts": {"a": 32}}), r"group_sizes\.experts\['a'\] must be an object by projection"),
        (changed(group_sizes={"experts": {"a": {"w2": 32, "down_proj": 32}}}), r"\['a'\] names a projection twice"),
        (
            changed(group_sizes={"experts": {"a": {"w1": 32}}}),
            r"experts\['a'\] gives the gate projection groups of 32 and the up projection groups of 64",
        ),
        (changed(group_sizes={"default": 64}), r"unknown key group_sizes\.default"),
        (changed(group_sizes=64), r"group_sizes must be an object"),
        (changed(ignore="lm_head"), r"ignore must be a list"),
        (changed(ignore=["re:("]), r"'re:\(' is not a regular expression"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(CheckpointError, match=message):
        MiLoFormat.from_dict(config)


@pytest.mark.parametrize(
    ("n", "k", "message"),
    [(96, 128, r"shape \[96, 128\] is not a multiple of 64"), (128, 192, "input size 192 .* group size 128")],
)
def test_matrices_that_do_not_fit(n, k, message):
    with pytest.raises(CheckpointError, match=message):
        MiLoFormat().check_matrix("layer", n, k, 128)


def test_default_table_is_empty():
    assert RankTable().of_module("anything") == 0
