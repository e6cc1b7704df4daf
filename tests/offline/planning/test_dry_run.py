"""``milo quantize --dry-run``: what it says is what a conversion then does, and nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_milo.checkpoint import CompensatorFormat, MiLoFormat
from vllm_milo.offline.calibration import choose
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.checkpoint.matrices import group_table
from vllm_milo.offline.cli import main
from vllm_milo.offline.families.table import FAMILIES
from vllm_milo.offline.nouns import Kind, Matrix, Recipe
from vllm_milo.offline.planning.splits import allowed_splits, narrow_groups
from vllm_milo.offline.source.reader import ModelReader


def quantize(source: Path, out: Path, *options: str) -> int:
    return main(["quantize", str(source), "-o", str(out), "--device", "cpu", *options])


def test_it_says_what_will_be(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--calibration", "none", "--max-rounds", "1"]
    assert quantize(bundled_model, tmp_path / "out", *options, "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)  # nothing else on stdout
    assert list(tmp_path.iterdir()) == []
    assert quantize(bundled_model, tmp_path / "out", *options, "--quiet") == 0
    report = inspect_checkpoint(tmp_path / "out")
    for key in (
        "bits_per_weight",
        "resident_bits_per_weight",
        "resident_bits_dense_16bit",
        "serving",
        "bytes",
        "quantized_bytes",
        "quantized_weights",
    ):
        assert said[key] == report[key], key
    assert said["exact"]
    assert said["format"] == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {kind: row["mean_rank"] for kind, row in said["by_kind"].items()} == {
        kind: row["mean"] for kind, row in report["ranks"].items()
    }
    assert "tokenizer.json" in said["companions"]
    assert said["calibration"] is None


@pytest.mark.parametrize("how", ["text", "self", "org/name"])
def test_no_weight_is_read_and_no_text_cut(
    how: str, bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(ModelReader, "load", lambda *_: pytest.fail("a weight was read"))
    for name in ("cut_windows", "fill_windows", "write_windows", "hub_documents", "load_source_model"):
        monkeypatch.setattr(choose, name, lambda *_, name=name: pytest.fail(name))
    assert quantize(bundled_model, tmp_path / "out", "--dry-run", "--calibration", how) == 0
    said = capsys.readouterr().out
    assert f"{how}: up to 32 windows, 16384 tokens; not cut yet" in said
    for part in (
        "172 matrices to quantize",
        "MiB on disk (",
        "bits a weight    about 3.59",
        "serving          a token alone reads about ",
        "memory           up to",
        "rank",
    ):
        assert part in said
    assert said.endswith("tensor parallel  1, 2\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_a_target_bounds_what_ranks_cost_in_serving(preset: str, bundled_model: Path, tmp_path: Path, capsys):
    """Whether the layers' needs are measured later or not."""
    options = ["--preset", preset, "--dry-run", "--serving-share"]
    shares = {}
    for most in ("9", "0.12"):
        assert quantize(bundled_model, tmp_path / "out", *options, most, "--json") == 0
        said = json.loads(capsys.readouterr().out)
        assert said["serving_target"] == float(most) == said["format"]["recipe"]["serving_share"]
        shares[most] = said["serving"]["serving_share"]
    assert 0 < shares["0.12"] <= 0.12 < shares["9"]
    assert quantize(bundled_model, tmp_path / "out", *options, "0.12") == 0
    said = capsys.readouterr().out
    assert f"serving share {shares['0.12']:.3f}, predicted time +" in said
    assert " (at most 0.12)\n" in said


@pytest.mark.parametrize(("bounds", "target"), [([], 0.6), (["--budget-bits", "3.7"], None)])
def test_a_presets_target_is_of_its_own_budget(bounds, target, bundled_model: Path, tmp_path: Path, capsys):
    assert quantize(bundled_model, tmp_path / "out", "--dry-run", "--json", *bounds) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["serving_target"] == target
    assert "--serving-share" not in captured.err


def test_ranks_that_a_target_bounds_are_warned_of(bundled_model: Path, tmp_path: Path, capsys):
    options = ["--preset", "fast", "--dry-run", "--json", "--serving-share", "0.05"]
    assert quantize(bundled_model, tmp_path / "out", *options) == 0
    captured = capsys.readouterr()
    bits = json.loads(captured.out)["bits_per_weight"]
    assert f"warning: --serving-share 0.05 bounds ranks: {bits:.3f} of 3.6 bits a weight are stored" in captured.err


def test_what_kurtosis_decides_is_said_to_be_about(bundled_model: Path, tmp_path: Path, capsys):
    assert quantize(bundled_model, tmp_path / "out", "--dry-run", "--ranks", "kurtosis=8") == 0
    assert "bits a weight    about " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration", "/nowhere.txt"], "/nowhere.txt: cannot be read as UTF-8 text"),
        (["--ranks", "frequency=8"], "needs --expert-counts"),
        (["--calibration", "/"], "/: cannot be read as UTF-8 text: Is a directory; name a text file"),
        (["--budget-bits", "2"], "take 3.25 bits a weight already"),
        (["--serving-share", "0"], "--serving-share 0: must be a number above 0, such as 0.3"),
        (["--serving-share", "0.3", "--ranks", "dense=8"], "--serving-share 0.3: bounds ranks that a budget shares"),
    ],
)
def test_what_would_be_refused_is_refused(
    bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    assert quantize(bundled_model, tmp_path / "out", "--dry-run", "--json", *options) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("milo quantize: error: ")
    assert message in captured.err
    assert captured.out == ""


def test_json_is_of_dry_runs_alone(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert quantize(bundled_model, tmp_path / "out", "--json") == 1
    assert "--json is for --dry-run alone" in capsys.readouterr().err


EXPERTS = "model.layers.0.block_sparse_moe.experts"
MIXTRAL = [
    Matrix("model.layers.0.self_attn.q_proj", Kind.ATTENTION, 4096, 4096),
    Matrix("model.layers.0.self_attn.k_proj", Kind.ATTENTION, 1024, 4096),
    Matrix("model.layers.0.self_attn.o_proj", Kind.ATTENTION, 4096, 4096),
    Matrix(f"{EXPERTS}.0.w1", Kind.ROUTED_EXPERT, 14336, 4096, EXPERTS, 0),
    Matrix(f"{EXPERTS}.0.w2", Kind.ROUTED_EXPERT, 4096, 14336, EXPERTS, 0),
]


@pytest.mark.parametrize(
    ("matrices", "group_size", "rank", "heads", "sizes"),
    [
        (MIXTRAL, 128, 16, (32, 8), [1, 2, 4, 8, 16]),  # over 32, the experts' 448 inputs are no groups of 128
        (MIXTRAL, 64, 16, (32, 8), [1, 2, 4, 8, 16, 32]),
        (MIXTRAL, 64, 16, (24, 8), [1, 2, 4, 8]),  # 24 heads over 3 and 6 do not cut 8 key heads
        (
            [Matrix(f"{EXPERTS}.0.w1", Kind.ROUTED_EXPERT, 96, 64)],
            64,
            16,
            (4, 4),
            [1],
        ),  # 48 cut a scale of U
        ([Matrix(f"{EXPERTS}.0.w1", Kind.ROUTED_EXPERT, 96, 64)], 64, 0, (4, 4), [1, 2, 4]),
        ([Matrix(f"{EXPERTS}.0.w2", Kind.ROUTED_EXPERT, 64, 192)], 64, 0, (6, 6), [1, 3]),
    ],
)
def test_tensor_parallel_sizes(matrices, group_size, rank, heads, sizes):
    config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    ranks = {matrix.name: rank for matrix in matrices}
    fmt = MiLoFormat(group_size, CompensatorFormat(3))
    assert allowed_splits(matrices, [], fmt, ranks, config, FAMILIES["mixtral"]) == sizes


def layer_of(inner: int, hidden: int = 2048, experts: int = 8) -> list[Matrix]:
    """A layer's matrices of a Mixtral with experts of some size."""
    sizes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    routed = [
        Matrix(f"{EXPERTS}.{index}.{leaf}", Kind.ROUTED_EXPERT, *shape, EXPERTS, index)
        for index in range(experts)
        for leaf, shape in sizes.items()
    ]
    return [Matrix("model.layers.0.self_attn.o_proj", Kind.ATTENTION, hidden, hidden), *routed]


@pytest.mark.parametrize(
    ("inner", "group_size", "budget", "narrow"),
    [
        (1408, 128, 3.6, ((1408, 64),)),  # DeepSeek-MoE-16B, GLM-4.5-Air: 11 groups of 128, which nobody can halve
        (768, 128, 3.6, ()),  # Qwen3-30B-A3B: two ranks have three groups each
        (1408, 128, 3.3, ()),  # of preset small, which has no bits left for it
        (1408, 64, 3.9, ()),  # 22 groups
        (704, 64, 4.5, ()),  # 11 groups of 64: a factor's scales are not cut either
        (2048, 128, 3.6, ()),
        (960, 128, 3.6, ()),  # 64 is all that divides it, by which no number of ranks can cut it
    ],
)
def test_groups_of_experts_that_nobody_could_split(inner: int, group_size: int, budget: float, narrow):
    matrices, family = layer_of(inner), FAMILIES["mixtral"]
    recipe = Recipe(group_size=group_size)
    assert narrow_groups(matrices, recipe, budget, family) == narrow
    recipe = replace(recipe, narrow=narrow)
    size, table = group_table(matrices, recipe)
    fmt, ranks = MiLoFormat(size, groups=table), dict.fromkeys((m.name for m in matrices), 16)
    config = {"num_attention_heads": 16, "num_key_value_heads": 16}
    in_two = inner in (768, 2048) or (inner == 1408 and fmt.module_group_size(f"{EXPERTS}.0.w2") == 64)
    assert (2 in allowed_splits(matrices, [], fmt, ranks, config, family)) == in_two


def test_groups_that_would_cost_too_much():
    """Few experts, whose down projections are wide beside all else."""
    family, matrices = FAMILIES["mixtral"], [m for m in layer_of(1408) if m.name.endswith(".w2")]
    assert narrow_groups(matrices, Recipe(group_size=128), 3.6, family) == ()


def test_latents_are_not_cut():
    name = "model.layers.0.self_attn"
    latent = [Matrix(f"{name}.kv_a_proj_with_mqa", Kind.ATTENTION, 576, 2048)]  # 576 over 2 ranks would cut groups
    config = {"num_attention_heads": 16, "num_key_value_heads": 16}
    fmt, ranks = MiLoFormat(128, CompensatorFormat(3)), {latent[0].name: 16}
    assert allowed_splits(latent, [], fmt, ranks, config, FAMILIES["deepseek_v2"]) == [1, 2, 4, 8, 16]
    cut = [latent[0]._replace(name=f"{name}.kv_b_proj")]
    assert allowed_splits(cut, [], fmt, {cut[0].name: 16}, config, FAMILIES["deepseek_v2"]) == [1]


def test_kept_matrices_are_cut_anywhere():
    kept = [Matrix(f"{EXPERTS}.0.w1", Kind.ROUTED_EXPERT, 96, 64)]
    config = {"num_attention_heads": 24, "num_key_value_heads": 24}
    assert allowed_splits([], kept, MiLoFormat(), {}, config, FAMILIES["mixtral"]) == [1, 2, 3, 4, 6, 8, 12, 24]
