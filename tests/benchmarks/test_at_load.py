"""The benchmark of quantizing at load: its divergences are right, and it measures the bundled model."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.at_load import run
from benchmarks.accuracy.at_load.contenders import CONTENDERS
from benchmarks.accuracy.at_load.predictions import Predictions, distance
from benchmarks.tensors import tensor_sizes

BUNDLED = Path("tests/assets/tiny-qwen2-moe").absolute()
TEXT = Path("tests/assets/valid.txt").absolute()
VOCABULARY, POSITIONS = 32, 50


def distributions(seed: int) -> torch.Tensor:
    """Return log-probabilities, float64 [P, V]."""
    logits = 3 * torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log_softmax(logits, -1)


def predictions(logprobs: torch.Tensor, top: int) -> Predictions:
    """Return what an engine would of distributions: ``top`` tokens, and token 0, which follows everywhere."""
    tables = [{int(token): float(row[token]) for token in [*row.topk(top).indices, 0]} for row in logprobs]
    return Predictions.of(tables, [0] * len(tables), top)


def test_divergence_is_exact_with_all_tokens_and_at_most_that_with_some():
    mine, theirs = distributions(0), distributions(1)
    exact = float((theirs.exp() * (theirs - mine)).sum(-1).mean())
    found = [distance(*(predictions(each, top) for each in (mine, theirs))) for top in (VOCABULARY, 20, 4, 1)]
    assert found[0].kl == pytest.approx(exact, rel=1e-5)
    assert found[0].known == pytest.approx(1, abs=1e-5)
    assert exact > found[1].kl > found[2].kl > found[3].kl > 0
    assert 1 > found[1].known > found[2].known > found[3].known
    agreed = float((mine.argmax(-1) == theirs.argmax(-1)).double().mean())
    assert {one.top1 for one in found} == {agreed}


def test_a_model_is_no_way_from_itself():
    mine = predictions(distributions(0), 5)
    assert distance(mine, mine)._replace(known=0) == (0, 0, 1)
    assert mine.perplexity == pytest.approx(math.exp(-float(distributions(0)[:, 0].mean())), rel=1e-5)


def test_the_same_divergence_by_hand():
    """Two of three tokens are known: KL of (1/2, 1/4, 1/4) from (1/4, 1/4, 1/2), the last token being the rest."""
    theirs = Predictions.of([{5: math.log(1 / 2), 7: math.log(1 / 4)}], [7], top=1)
    mine = Predictions.of([{7: math.log(1 / 4), 5: math.log(1 / 4)}], [7], top=1)
    found = distance(mine, theirs)
    assert found.kl == pytest.approx(math.log(2) / 2 - math.log(2) / 4)
    assert found.known == pytest.approx(3 / 4)
    assert mine.ids.tolist() == [[5, 7]]  # of equals the smaller id first
    assert found.top1 == 1


def test_fewer_tokens_at_a_position_are_no_token_each():
    short = Predictions.of([{3: math.log(1 / 2)}], [3], top=2)
    assert short.ids.tolist() == [[3, -1, -1]]
    assert distance(short, short).kl == 0


def test_broken_log_probabilities_are_refused():
    with pytest.raises(ValueError, match="position 1: the token that follows, 4"):
        Predictions.of([{4: -1.0}, {3: -1.0}], [4, 4], top=1)
    with pytest.raises(ValueError, match="not finite"):
        Predictions.of([{4: math.nan}], [4], top=1)
    one = Predictions.of([{4: -1.0}], [4], top=1)
    with pytest.raises(ValueError, match="0 and 1 positions"):
        distance(one.part(0, 0), one)


def test_bits_of_the_formats():
    assert {name: way.bits for name, way in CONTENDERS.items()} == {
        "bf16": None,
        "milo": 3.6,
        "rtn3-g64": 3.25,
        "rtn3-g32": 3.5,
        "rtn4-g128": 4.125,
        "rtn3-g32-zeros": 3.59375,
    }


def test_bits_in_memory_are_of_what_is_quantized():
    model = torch.nn.Module()
    model.head = torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    model.tied = model.head.weight
    model.weight = torch.nn.Parameter(torch.zeros(16, 32, dtype=torch.bfloat16))
    plain = tensor_sizes(model)
    assert plain == {"weight": (1024, 512), "tied": (64, 32)}
    assert run.resident_bits(plain, plain) is None
    # 16 x 32 codes of 3 bits, and a scale of 16 bits for each 32
    model.weight = torch.nn.Parameter(torch.zeros(16, 3, dtype=torch.int32), requires_grad=False)
    model.scale = torch.nn.Parameter(torch.zeros(16, 1, dtype=torch.bfloat16))
    assert run.resident_bits(tensor_sizes(model), plain) == 3.5


def test_failures_are_recorded_and_the_next_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With something in place of vLLM that fails at once, and says what it was told."""
    said = "raise ImportError(f\"no_such_module {os.environ.get('VLLM_HUMMING_ONLINE_QUANT_CONFIG')}\")"
    (tmp_path / "vllm.py").write_text(f"import os\n{said}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    output = tmp_path / "at_load.json"
    run.main([str(BUNDLED), "--text", str(TEXT), "-o", str(output), "--only", "rtn3-g64", "bf16", "--max-windows", "1"])
    record = json.loads(output.read_text())
    assert record["window"] == 511  # the model has room for 512 tokens, of which vLLM makes one
    rows = record["rows"]
    assert [row["contender"] for row in rows] == ["bf16", "rtn3-g64"]
    assert "no_such_module None" in rows[0]["error"]
    assert 'no_such_module {"dtype": "uint3", "group_size": 64' in rows[1]["error"]
    assert "Failed:" in output.with_suffix(".md").read_text()


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "at_load.json"
    words = ["--only", "bf16", "milo", "--max-windows", "3", "--window", "96", "--top", "4096"]
    run.main([str(BUNDLED), "--text", str(TEXT), "-o", str(output), *words])
    record = json.loads(output.read_text())
    assert (record["window"], record["windows"]) == (96, {"valid.txt": 3})
    plain, milo = record["rows"]
    scores, theirs = milo["texts"]["valid.txt"], plain["texts"]["valid.txt"]
    assert scores["tokens"] == 3 * 95
    assert scores["known"] == pytest.approx(1, abs=1e-4)
    assert theirs["kl"] == pytest.approx(0, abs=1e-6)
    assert 0.03 < scores["kl"] < 0.3
    assert 0.7 < scores["top1"] < 0.95
    assert 1 < scores["perplexity"] / theirs["perplexity"] < 1.3
    assert plain["resident_bits"] is None
    # where a CPU has AMX, vLLM packs layers in 16 bits, and what a packed tensor takes is not seen
    assert 3.5 < milo["resident_bits"] < (5 if torch.cpu._is_amx_tile_supported() else 3.8)
    assert milo["weight_bytes"] < 0.5 * plain["weight_bytes"]
    assert 0 < milo["load_seconds"] < milo["start_seconds"]
    assert "milo: " in capsys.readouterr().out
