"""The table of KL divergences: GPTQ beside rounding to nearest, on the bundled model."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tiny_models import TEXT, make_model

from benchmarks import divergence, streamed_gptq
from benchmarks.accuracy.gptq import Gptq
from vllm_milo.names import leaf_of
from vllm_milo.offline.calibration import memory
from vllm_milo.offline.effort import CPU_EFFORT, GPU_EFFORT
from vllm_milo.offline.evaluation.divergence import open_streamed
from vllm_milo.offline.source.reader import ModelReader


def test_gptq_beats_rounding_to_nearest_in_the_table(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = [str(small_model), "--text", str(TEXT), "-o", str(tmp_path), "--max-windows", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["divergence", *arguments, "--only", "RTN g64", "GPTQ g64", "GPTQ g32"])
    divergence.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "divergence.json").read_text())["rows"]}
    assert rows["GPTQ g32"]["mean_kl"] < rows["GPTQ g64"]["mean_kl"] < 0.9 * rows["RTN g64"]["mean_kl"]
    assert rows["GPTQ g64"]["bits"] == 3 + 19 / 64
    assert rows["GPTQ g32"]["bits"] == 3 + 19 / 32
    assert "| GPTQ g32 | 3.594 |" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_folder_is_a_whole_model_of_few_values(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, out = make_model(family, tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr(streamed_gptq, "calibration_windows", lambda *_: torch.randint(0, 256, (2, 64)))
    streamed_gptq.write_gptq(source, out, Gptq(64), torch.device("cpu"))
    mine, theirs = ModelReader(out), ModelReader(source)
    assert {matrix.name for matrix in mine.matrices} == {matrix.name for matrix in theirs.matrices}
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert mine.config == theirs.config
    for mine_layer, theirs_layer in zip(mine.layers, theirs.layers, strict=True):
        assert mine_layer.others == theirs_layer.others
        original = dict(theirs.load_layer(theirs_layer, torch.device("cpu")))
        for matrix, values in mine.load_layer(mine_layer, torch.device("cpu")):
            assert 0.01 < (values - original[matrix]).norm() / original[matrix].norm() < 0.6
            assert all(group.unique().numel() <= 8 for group in values[:4].unflatten(-1, (-1, 64)).flatten(0, 1))


def test_each_stage_sees_what_the_one_before_puts_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Attention's values and the ups of experts become 0: nothing then reaches the outputs and the downs."""
    reader = ModelReader(make_model("mixtral", tmp_path))
    model = open_streamed(tmp_path, torch.device("cpu"), torch.float32)
    seen: dict[str, list[float]] = defaultdict(list)
    real = streamed_gptq.quantize_stage

    def stage(loaded, moments, options):
        places = dict(loaded)
        for matrix in places:
            seen[leaf_of(matrix.name)].append(float(moments.by_name[matrix.name].total.abs().max()))
        zeros = {m: torch.zeros_like(place) for m, place in places.items() if leaf_of(m.name) in ("v_proj", "w3")}
        return {**real(places.items(), moments, options), **zeros}

    monkeypatch.setattr(streamed_gptq, "quantize_stage", stage)
    list(streamed_gptq.gptq_layers(model, reader, torch.randint(0, 256, (4, 32)), Gptq(64)))
    assert {leaf for leaf, values in seen.items() if max(values) == 0} == {"o_proj", "w2"}
    assert len(seen) == 7


def test_gptq_gets_as_much_text_as_milo_quantize(bundled_model: Path, monkeypatch: pytest.MonkeyPatch):
    reader = ModelReader(bundled_model)
    assert streamed_gptq.default_windows(reader, "cpu") == CPU_EFFORT.windows
    assert streamed_gptq.default_windows(reader, "cuda") == GPU_EFFORT.windows
    monkeypatch.setattr(memory, "DEFAULT_STATES", 2**22)
    assert 1 <= streamed_gptq.default_windows(reader, "cuda") < CPU_EFFORT.windows
