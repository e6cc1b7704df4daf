"""The accuracy benchmark's own parts: GPTQ, statistics, swapped weights, contenders, the pool, report and plot."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from tiny_models import TEXT, make_model

from benchmarks.accuracy.activations import second_moments
from benchmarks.accuracy.contenders import CALIBRATION, COUNTS, SECTIONS, WINDOWS, Contender, Shape, policies_section
from benchmarks.accuracy.gptq import Gptq, gptq, quantize_model
from benchmarks.accuracy.perplexity import split_text
from benchmarks.accuracy.pool import Job, QuantizePool
from benchmarks.accuracy.quantized_model import QuantizedModel
from benchmarks.accuracy.report import format_report
from benchmarks.accuracy.run import Benchmark, Settings
from benchmarks.accuracy.scores import (
    choose_windows,
    gap_closed,
    interpolate,
    paired_difference,
    paper_share,
    perplexities,
    spread,
)
from vllm_milo.offline.calibration.choose import TextOptions
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.cli import quantize
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.ranks.policies import Statistics, assign_ranks, parse_policies
from vllm_milo.offline.solve.base.group import quantize_rtn
from vllm_milo.offline.source.reader import ModelReader


def correlated_inputs(tokens: int, size: int) -> torch.Tensor:
    """Inputs with a few strong directions, as activations have."""
    return torch.randn(tokens, 8) @ torch.randn(8, size) + 0.3 * torch.randn(tokens, size)


def output_error(weights: torch.Tensor, quantized: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weights - quantized).mT).norm() / (inputs @ weights.mT).norm())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("integer_zero", [False, True])
def test_gptq_beats_rounding_on_inputs_it_has_not_seen(act_order: bool, integer_zero: bool):
    weights, inputs = torch.randn(2, 48, 192), correlated_inputs(4096, 192)
    seen, unseen = inputs[:2048], inputs[2048:]
    options = Gptq(64, integer_zero, act_order, block=128)
    moments = (seen.T @ seen).expand(2, -1, -1)
    rounded = gptq(weights, torch.zeros_like(moments), options)
    found = gptq(weights, moments, options)
    assert output_error(weights, found, unseen) < 0.6 * output_error(weights, rounded, unseen)


def test_gptq_with_uncorrelated_or_no_inputs_is_rounding_to_nearest():
    weights = torch.randn(3, 16, 128)
    expected = quantize_rtn(weights, 64).dequantize()
    for moments in (torch.eye(128) * 5.0, torch.zeros(128, 128)):
        for act_order in (False, True):
            found = gptq(weights, moments.expand(3, -1, -1), Gptq(64, integer_zero=False, act_order=act_order))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_gptq_matrices_of_a_batch_are_independent_and_blocks_change_nothing():
    weights, moments = torch.randn(2, 16, 128), []
    for _ in range(2):
        inputs = correlated_inputs(512, 128)
        moments.append(inputs.T @ inputs)
    together = gptq(weights, torch.stack(moments), Gptq(32))
    for index in range(2):
        alone = gptq(weights[index : index + 1], moments[index][None], Gptq(32, block=64))
        # a code at the edge of two may fall to either side
        assert (alone[0] - together[index]).abs().gt(1e-4).float().mean() < 0.02


def test_gptq_values_are_stored_codes():
    found = gptq(torch.randn(1, 8, 64), torch.eye(64)[None], Gptq(64))
    assert all(row.unique().numel() <= 8 for row in found[0])
    assert (found == 0).any()  # an integer zero point represents 0 exactly
    assert Gptq(64).bits == pytest.approx(3.296875)
    assert Gptq(32).bits == pytest.approx(3.59375)
    assert Gptq(64, integer_zero=False).bits == 3.5


def test_windows_are_disjoint_and_of_the_text():
    tokens = torch.arange(1000)
    windows = choose_windows(tokens, 16, 20, 3)
    assert windows.shape == (3, 20, 16)
    assert windows.unique().numel() == windows.numel()
    assert (windows.diff() == 1).all()
    assert choose_windows(tokens, 16, 100, 3).shape == (3, 20, 16)
    with pytest.raises(ValueError, match="62 windows of 16; 63 sets"):
        choose_windows(tokens, 16, 1, 63)


def test_spread_and_gap_are_paired_by_seed():
    found = gap_closed([11.0, 21.0], [12.0, 24.0], [10.0, 20.0])
    assert found == [0.5, 0.75]
    assert spread(found) == pytest.approx((0.625, math.sqrt(2) * 0.125))
    assert perplexities(torch.tensor([[0.0, 2.0], [1.0, 1.0]])) == pytest.approx([math.e, math.e])


def test_paired_difference_ignores_what_windows_have_in_common():
    windows = torch.randn(3, 50, dtype=torch.float64) * 10
    found = paired_difference(windows + 0.1 + 0.01 * torch.randn(3, 50), windows)
    assert found.mean == pytest.approx(0.1, abs=0.01)
    assert found.error == pytest.approx(0.01 / math.sqrt(150), rel=0.3)


def test_paper_share_is_the_best_policy_between_its_ranks():
    curves = {
        "dense": [(3.7, [0.4, 0.6]), (3.5, [0.0, 0.0])],
        "sparse": [(3.5, [0.0, 0.0]), (3.55, [0.3, 0.3]), (4.0, [0.3, 0.3])],
    }
    assert interpolate(curves["dense"], 3.6) == pytest.approx([0.2, 0.3])
    assert interpolate(curves["dense"], 3.8) is None
    share = paper_share(curves, 3.6)
    assert share is not None
    assert (share.policy, share.by_seed) == ("sparse", pytest.approx([0.3, 0.3]))
    share = paper_share(curves, 3.69)
    assert share is not None
    assert (share.policy, share.by_seed) == ("dense", pytest.approx([0.38, 0.57]))
    assert paper_share(curves, 3.4) is None


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_swapped_weights_give_the_logits_of_the_loaded_checkpoint(tmp_path: Path, family: str):
    source, out = make_model(family, tmp_path / "source"), tmp_path / "out"
    options = ["--ranks", "uniform=8", "--max-rounds", "1", "--calibration", "none"]
    assert milo(["quantize", str(source), "-o", str(out), "--quiet", *options]) == 0
    model = QuantizedModel(source, "cpu")
    ids = torch.randint(0, 256, (2, 24))
    with torch.inference_mode():
        before = model.model(input_ids=ids).logits
        model.load(out)
        swapped = model.model(input_ids=ids).logits
        model.restore()
        assert torch.equal(model.model(input_ids=ids).logits, before)
        torch.testing.assert_close(load_model(out)(input_ids=ids).logits, swapped)
    assert (swapped - before).abs().max() > 0.01


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_moments_are_of_the_inputs_that_reach_each_matrix(tmp_path: Path, family: str):
    """Routed experts' moments against inputs recorded in the eager loop over experts."""
    model = QuantizedModel(make_model(family, tmp_path), "cpu")
    ids = torch.randint(0, 256, (3, 24))
    moments = second_moments(model, ids, batch=2)
    assert moments.keys() == model.matrices.keys()
    model.model.set_experts_implementation("eager")
    recorded: dict[tuple[int, ...], torch.Tensor] = {}
    real = torch.nn.functional.linear

    def record(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = inputs.flatten(0, -2).double()
        key = (weight.data_ptr(), *weight.shape)
        recorded[key] = recorded.get(key, 0) + rows.T @ rows
        return real(inputs, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.nn.functional, "linear", record)
        model.model(input_ids=ids)
    up = model.family.projections.up  # fused with gate: the view does not start where the weight does
    checked = 0
    for name, view in model.views.items():
        if name.endswith(f".{up}") and ".experts." in name:
            continue
        rows = 2 * view.shape[0] if model.kind(name) == "routed_gate_up" else view.shape[0]
        expected = recorded.get((view.data_ptr(), rows, view.shape[1]))
        if expected is None:  # no token reached the expert
            assert float(moments[name].abs().max()) == 0
            continue
        torch.testing.assert_close(moments[name].double(), expected, rtol=1e-3, atol=1e-3)
        checked += 1
    assert checked > len(model.views) / 3


def test_gptq_of_a_model_lowers_output_errors_of_every_kind(tmp_path: Path):
    model = QuantizedModel(make_model("qwen2_moe", tmp_path), "cpu")
    ids = torch.randint(0, 256, (8, 64))
    moments = second_moments(model, ids, batch=8)
    quantize_model(model, ids, 8, Gptq(64, integer_zero=False))
    calibrated = model.errors(moments)["output"]
    model.put({name: quantize_rtn(weights, 64).dequantize() for name, weights in model.source.items()})
    rounded = model.errors(moments)["output"]
    assert rounded.keys() == {"attention", "dense_ffn", "shared_expert", "routed_gate_up", "routed_down"}
    for kind, error in rounded.items():
        assert calibrated[kind] < error


def test_policies_section_is_at_equal_bytes(bundled_model: Path):
    """The ablation's ranks, as the converter assigns them, cost nearly the same within each half."""
    matrices = ModelReader(bundled_model).matrices
    wide = Shape(1024, [matrix._replace(n=8 * matrix.n, k=8 * matrix.k) for matrix in matrices])
    costs = {}
    for contender in policies_section(wide, 0):
        ranks = contender.arguments[3]
        if "frequency" in ranks or "kurtosis" in ranks:
            continue  # the mean rank of sparse, spread by data
        assigned, _ = assign_ranks(parse_policies(ranks), wide.matrices, Statistics())
        costs[ranks] = sum(assigned[m.name] * (m.n + m.k) for m in wide.matrices)
    alone = [cost for ranks, cost in costs.items() if "," not in ranks][:3]
    beside = [cost for ranks, cost in costs.items() if "," in ranks] + list(costs.values())[-1:]
    assert max(alone) / min(alone) < 1.15
    assert max(beside) / min(beside) < 1.15


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_name_each_contender_once_on_a_wide_model(section: str, bundled_model: Path):
    contenders = SECTIONS[section](Shape(1024, ModelReader(bundled_model).matrices), 20)
    names = [contender.name for contender in contenders]
    assert len(names) == len(set(names)) > 5
    for contender in contenders:
        assert (COUNTS in contender.arguments) == ("frequency" in " ".join(contender.arguments))


@pytest.mark.parametrize("section", SECTIONS)
def test_contenders_are_calls_that_the_command_line_takes(
    section: str, bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each gets as far as the conversion, with the method, budget and calibration that its name says."""
    counts = tmp_path / "counts.json"
    layers = {matrix.experts for matrix in ModelReader(bundled_model).matrices if matrix.experts}
    counts.write_text(json.dumps({"expert_counts": {layer: [1] * 12 for layer in layers}}), encoding="utf-8")
    seen: list[Conversion] = []
    monkeypatch.setattr(quantize, "carry_out", lambda plan, progress, claim: seen.append(plan.conversion))
    windows = torch.zeros(3, 16, dtype=torch.int64)
    asked: list[tuple[str, int]] = []

    def choose(reader: ModelReader, how: str, options: TextOptions) -> torch.Tensor:
        asked.append((how, options.windows))
        return windows

    monkeypatch.setattr(quantize, "calibration_windows", choose)
    monkeypatch.setattr(quantize, "print_summary", lambda summary: None)
    values = {COUNTS: str(counts), CALIBRATION: str(TEXT), WINDOWS: "3"}
    for contender in SECTIONS[section](Shape(1024, ModelReader(bundled_model).matrices), 20):
        arguments = [values.get(argument, argument) for argument in contender.arguments]
        assert milo(["quantize", str(bundled_model), "-o", str(tmp_path / "out"), *arguments]) == 0, contender
        made = seen.pop()
        said = contender.name.partition(", ")[2]
        calibrated = contender.name.split()[0] in ("balanced", "best", "small") and said != "no text"
        text = {"": "text", "same text": str(TEXT), "own text": "self"}.get(said)
        assert asked == ([(text, 3)] if calibrated else [])
        assert (made.text is not None) == calibrated
        asked.clear()
        if contender.group.startswith("paper"):
            assert made.recipe.method == "paper"
            assert made.policies
        elif "--budget-bits" in contender.arguments:
            assert made.recipe.method == "milo"
            assert f"{contender.name.split()[0]} {made.budget_bits:g}" == contender.name.partition(",")[0]


def test_pool_reports_failures_and_gives_up_at_the_deadline(tmp_path: Path, bundled_model: Path):
    good = Contender("good", "added", ("--method", "rtn"))
    bad = Contender("bad", "added", ("--no-such-option",))
    jobs = [(c, Job(bundled_model, tmp_path / c.name, c.arguments)) for c in (bad, good)]
    with QuantizePool(jobs, 2, math.inf) as pool:
        outcomes = {contender.name: outcome for contender, outcome in pool}
    assert "no-such-option" in (outcomes["bad"].error or "")
    assert outcomes["good"].error is None
    assert (outcomes["good"].out / "config.json").exists()
    with QuantizePool(jobs, 2, time.monotonic()) as pool:
        assert [outcome.error for _, outcome in pool] == ["skipped: out of time"] * 2


def test_pool_drops_results_that_are_ready_but_late(tmp_path: Path, bundled_model: Path):
    good = Contender("good", "added", ("--method", "rtn"))
    jobs = [(good, Job(bundled_model, tmp_path / str(number), good.arguments)) for number in range(2)]
    with QuantizePool(jobs, 1, math.inf) as pool:
        found = iter(pool)
        assert next(found)[1].error is None
        while not (tmp_path / "1" / "config.json").exists():
            time.sleep(0.05)
        pool.deadline = time.monotonic()
        assert next(found)[1].error == "skipped: out of time"


def test_pool_ends_workers_that_are_busy_at_the_deadline(tmp_path: Path, bundled_model: Path):
    slow = Contender("slow", "added", ("--ranks", "uniform=64", "--max-rounds", "20", "--calibration", "none"))
    jobs = [(slow, Job(bundled_model, tmp_path / str(number), slow.arguments)) for number in range(10)]
    with QuantizePool(jobs, 1, math.inf) as pool:
        while not any(".partial" in path.name for path in tmp_path.iterdir()):
            time.sleep(0.05)
        pool.deadline = time.monotonic() + 0.5
        assert [outcome.error for _, outcome in pool][-1] == "skipped: out of time"
    assert multiprocessing.active_children() == []
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) < len(jobs)
    assert not [name for name in left if ".partial" in name]


def test_calibration_text_is_not_scored(tmp_path: Path):
    scored, calibration = split_text(TEXT, None, tmp_path)
    whole = TEXT.read_text(encoding="utf-8")
    parts = [path.read_text(encoding="utf-8") for path in (scored, calibration)]
    assert "".join(parts) == whole
    assert 0.25 < len(parts[1]) / len(whole) < 0.31
    assert split_text(TEXT, calibration, tmp_path) == (TEXT, calibration)


def test_benchmark_scores_paired_rows_and_reports_them(tmp_path: Path, bundled_model: Path):
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    tokens = torch.randint(3, 4096, (2000,))
    settings = Settings(window=32, windows=2, calibration_windows=4, batch=2, rounds=1, jobs=2)
    record = {"model": "tiny", "text": "random"}
    bench = Benchmark(bundled_model, tokens, tokens[:500], text, tmp_path / "out", settings, record)
    rtn = Contender("added rtn", "added", ("--method", "rtn"))
    bench.run(["main"], "^(RTN|GPTQ g64|paper dense=(16|64))$", [rtn, Contender("broken", "added", ("--nonsense",))])
    result = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["bf16", "GPTQ g64", "HQQ", "RTN", "paper dense=16", "paper dense=64", "added rtn", "broken"]
    assert rows["added rtn"]["perplexity"] == rows["RTN"]["perplexity"]
    assert rows["bf16"]["gap_closed"] == [1, 1, 1]
    assert rows["HQQ"]["gap_closed"] == [0, 0, 0]
    assert rows["HQQ"]["bits"] == 3.5 < rows["paper dense=16"]["bits"] < 3.75 < rows["paper dense=64"]["bits"]
    assert rows["paper dense=16"]["over_paper"] == [0, 0, 0]
    assert result["paper_share"]["3.75"]["policy"] == "paper dense"
    assert "--nonsense" in rows["broken"]["error"]
    assert bench.failures() == [f"broken: {rows['broken']['error']}"]
    report = format_report(result)
    assert "| RTN | 3.500 |" in report
    assert "- broken: " in report


def test_plot_is_written(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="pip install 'vllm-milo[bench]'")
    from benchmarks.accuracy.plot import plot

    rows = [
        {"section": "main", "name": name, "group": group, "bits": bits, "perplexity": [value, value + 1]}
        for name, group, bits, value in (
            ("bf16", "baseline", 16.0, 10),
            ("HQQ", "baseline", 3.5, 12),
            ("a", "paper dense", 3.6, 11.5),
            ("b", "paper dense", 3.7, 11.2),
        )
    ]
    plot({"model": "m", "rows": [*rows, {"section": "main", "name": "c", "error": "?"}]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
