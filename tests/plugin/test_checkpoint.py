import pytest

from vllm_milo.checkpoint import CheckpointError, MiLoFormat, RankTable, find_key, split_expert_name

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
    assert fmt.base_tensors(128, 256) == {
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
        MiLoFormat(group_size=128).check_matrix("layer", n, k)


def test_default_table_is_empty():
    assert RankTable().of_module("anything") == 0
