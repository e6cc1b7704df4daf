"""The kernel benchmarks on CPU and tiny shapes: roofs, poisoned outputs, records, reports, failing peers."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import gates, linear, moe_layer, report, wide
from benchmarks.kernels.moe_contenders import Layer, MoEShape, contenders
from benchmarks.kernels.report import format_report
from benchmarks.kernels.timing import Ceilings, microseconds, roof
from benchmarks.records import markdown_table
from vllm_milo.kernels.tuning.timing import BadOutputError, check_outputs, time_calls

CPU = torch.device("cpu")


def test_roof_is_the_slower_of_memory_and_compute():
    ceilings = Ceilings(copy_bandwidth=2e12, matmul_flops=5e14)
    assert roof(2e9, 1e9, ceilings) == (1e-3, "memory")
    assert roof(2e6, 5e12, ceilings) == (1e-2, "compute")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_left_poisoned_are_refused(value: float):
    bad = torch.ones(3, 4)
    bad[1, 2] = value
    with pytest.raises(BadOutputError, match=r"call 1: 1 of 12"):
        check_outputs([torch.ones(2), bad])
    with pytest.raises(BadOutputError, match="call 0: all 2"):
        check_outputs([torch.zeros(2)])


def test_time_calls_times_one_call(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def call() -> torch.Tensor:
        nonlocal now
        now += 0.25
        return torch.ones(1)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timing, outputs = time_calls([call] * 4, CPU, 0.01)
    assert (timing.minimum, timing.median) == (0.25, 0.25)
    assert timing.replays >= 3
    assert len(outputs) == 4


def test_numbers_and_tables_are_formatted():
    assert [microseconds(value) for value in (1.23456e-6, 45.67e-6, 123.4e-6)] == ["1.23", "45.7", "123"]
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_layers_rotate_where_one_tokens_experts_fit_in_l2():
    l2 = 50 * 2**20
    copies = {name: moe_layer.copies_needed(shape, l2) for name, shape in moe_layer.SHAPES.items()}
    assert copies == {"mixtral": 1, "deepseek": 8, "qwen3": 8, "tiny": 8}
    assert moe_layer.copies_needed(moe_layer.SHAPES["tiny"], 0) == 1


@pytest.mark.parametrize(("rank", "bits"), [(0, 3.5), (16, 3.5 + 3.25 * 16 * (128 + 192) / (128 * 192))])
def test_our_layer_stores_what_the_format_says(rank: int, bits: float):
    """3-bit codes with fp16 scale and zero per 64, and factors of 3 bits with an fp16 scale per 64."""
    shape = moe_layer.SHAPES["tiny"]
    layer = contenders(rank)["milo"](shape, [1], CPU)
    stored = layer.expert_bytes(shape.experts) * 8 / shape.expert_weights
    assert stored == pytest.approx(bits, rel=2e-3)  # the rank offsets


def run(tmp_path: Path, *words: str) -> dict:
    output = tmp_path / "moe.json"
    moe_layer.main(
        [
            "-o",
            str(output),
            "--shapes",
            "tiny",
            "--device",
            "cpu",
            "--point-seconds",
            "0.001",
            "--tokens",
            "1,4",
            *words,
        ]
    )
    return json.loads(output.read_text())


def test_dry_run_writes_record_and_report(tmp_path: Path):
    record = run(tmp_path, "--contenders", "milo,milo-no-compensators", "--rank", "8")
    assert [(row["contender"], row["tokens"]) for row in record["rows"]] == [
        ("milo", 1),
        ("milo", 4),
        ("milo-no-compensators", 1),
        ("milo-no-compensators", 4),
    ]
    assert record["errors"] == record["skipped"] == []
    for row in record["rows"]:
        assert row["relative_error"] < 0.01
        assert row["roof_fraction"] == pytest.approx(row["roof_microseconds"] / row["microseconds"])
        assert row["active_experts"] == 2 if row["tokens"] == 1 else 2 <= row["active_experts"] <= 4
    assert record["ceilings"]["copy_bandwidth"] > 1e8
    assert record["environment"]["torch"] == torch.__version__
    text = (tmp_path / "moe.md").read_text()
    assert "| milo |" in text
    assert "overhead of compensators" in text


def test_dense_layers_in_16_bits_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(wide, "DTYPE", torch.float16)
    monkeypatch.setattr(wide, "CALLS_IN_GRAPH", 2)
    wide.main(["-o", str(tmp_path / "wide.json"), "--shapes", "tiny", "--tokens", "3", "--seconds", "0.001"])
    (row,) = json.loads((tmp_path / "wide.json").read_text())["rows"]
    assert (row["shape"], row["tokens"]) == ("tiny", 3)
    assert {one["in_codes"] for one in row["tiles"]} == {False, True}
    assert all(0 <= one["error"] < wide.MAX_ERROR for one in row["tiles"])
    assert "| tiny | 3 |" in capsys.readouterr().out
    right = wide.wide_linear
    monkeypatch.setattr(wide, "wide_linear", lambda *given, **named: right(*given, **named) * 1.05)
    with pytest.raises(ValueError, match=r"relative error 0\.05 against the library"):
        wide.main(["-o", str(tmp_path / "wide.json"), "--shapes", "tiny", "--tokens", "3", "--seconds", "0.001"])


def test_gates_are_timed_with_the_layers_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(gates, "DTYPE", torch.float16)
    monkeypatch.setattr(gates, "CALLS_IN_GRAPH", 2)
    monkeypatch.setattr(gates, "OTHERS", gates.OTHERS[:1])
    monkeypatch.setattr(gates, "TURNS", 1)
    words = ["-o", str(tmp_path / "gates.json"), "--models", "tiny", "--tokens", "3", "--seconds", "0.001"]
    gates.main(words)
    (row,) = json.loads((tmp_path / "gates.json").read_text())["rows"]
    assert (row["model"], row["tokens"]) == ("tiny", 3)
    assert set(row["microseconds"]) >= {"library", *row["errors"]}
    assert len(row["errors"]) == 2
    assert all(len(turns) == 1 for turns in row["microseconds"].values())
    assert "| tiny | 3 |" in capsys.readouterr().out
    right = gates.by_tile
    monkeypatch.setattr(gates, "by_tile", lambda *given, **named: right(*given, **named) * 1.05)
    with pytest.raises(ValueError, match=r"relative error 0\.0[45]\d* of the logits against the library's"):
        gates.main(words)


def test_a_record_is_shown_and_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path, "--contenders", "milo")
    capsys.readouterr()
    report.main([str(tmp_path / "moe.json")])
    shown = capsys.readouterr().out
    assert "| milo |" in shown
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "moe.png").exists() == has_matplotlib
    assert ("matplotlib is not installed" in shown) != has_matplotlib


def test_the_reference_check_catches_a_wrong_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def wrong(shape: MoEShape, tokens: list[int], device: torch.device) -> Layer:
        layer = contenders(16)["milo"](shape, tokens, device)
        return layer._replace(call=lambda *arguments: layer.call(*arguments) * 1.05)

    monkeypatch.setattr(moe_layer, "contenders", lambda rank: {"milo": wrong})
    record = run(tmp_path, "--contenders", "milo")
    assert record["rows"] == []
    assert "above 0.02" in record["errors"][0]["error"]


def test_a_failing_contender_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(shape: MoEShape, tokens: list[int], device: torch.device) -> Layer:
        raise RuntimeError("no such kernel")

    both = {"peer": broken, "milo": contenders(0)["milo"]}
    monkeypatch.setattr(moe_layer, "contenders", lambda rank: both)
    record = run(tmp_path, "--contenders", "peer,milo")
    assert [row["contender"] for row in record["rows"]] == ["milo", "milo"]
    assert record["errors"] == [{"shape": "tiny", "contender": "peer", "error": "RuntimeError: no such kernel"}]
    assert "no such kernel" in format_report(record)


def test_nothing_starts_after_the_budget(tmp_path: Path):
    record = run(tmp_path, "--contenders", "milo", "--seconds", "0")
    assert record["rows"] == []
    assert record["skipped"] == [{"shape": "tiny", "contender": "milo"}]


def test_report_compares_with_the_fastest_peer():
    def row(contender: str, microseconds: float) -> dict:
        return {
            "shape": "s",
            "contender": contender,
            "tokens": 16,
            "microseconds": microseconds,
            "roof_fraction": 0.5,
            "bits_per_weight": 4.0,
        }

    record = {
        "benchmark": "moe_layer",
        "environment": {"device": "d", "torch": "t", "triton": None, "vllm": None},
        "ceilings": {"copy_bandwidth": 3e12, "matmul_flops": 8e14},
        "rows": [row("milo", 80.0), row("milo-no-compensators", 75.0), row("a", 100.0), row("b", 160.0)],
        "errors": [],
        "skipped": [],
    }
    text = format_report(record)
    assert "| milo / fastest peer |  | 0.80 (a) |" in text
    assert "| overhead of compensators |  | +6.7% |" in text


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        moe_layer.main(["-o", "x.json", "--shapes", "mixtrel"])
    assert "unknown mixtrel" in capsys.readouterr().err


def test_dense_layers_rotate_over_three_times_l2():
    l2 = 50 * 2**20
    assert linear.copies_needed(linear.SHAPES["mixtral-qkv"], l2) == 15
    assert linear.copies_needed(linear.SHAPES["tiny"], 0) == 1


def test_linear_dry_run(tmp_path: Path):
    output = tmp_path / "linear.json"
    words = ["-o", str(output), "--shapes", "tiny", "--device", "cpu", "--point-seconds", "0.001", "--tokens", "1,4"]
    linear.main([*words, "--contenders", "milo,milo-8bit,milo-16bit,milo-no-compensators,bf16", "--rank", "32"])
    record = json.loads(output.read_text())
    assert record["errors"] == record["skipped"] == []
    assert len(record["rows"]) == 10
    rows = {row["contender"]: row for row in record["rows"]}
    assert rows["milo"]["ranks"] == [32, 32]
    assert rows["milo"]["relative_error"] < 0.01
    assert rows["milo-no-compensators"]["bits_per_weight"] == 3.5
    # two parts of rank 32: 3.25 bits for each factor value
    assert rows["milo"]["bits_per_weight"] == 3.5 + 3.25 * 32 * (128 + 64 + 2 * 128) / (192 * 128)
    assert rows["bf16"]["bits_per_weight"] == rows["milo-16bit"]["bits_per_weight"] == 16
    assert rows["milo-16bit"]["relative_error"] < 0.01
    assert "| milo / fastest peer |" in output.with_suffix(".md").read_text()
