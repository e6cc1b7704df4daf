"""The milo command: quantize, inspect, eval, stats on the bundled model, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import TEXT

from vllm_milo.offline.cli import main
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.expert_use import read_expert_counts
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> dict[str, Path]:
    """The bundled model by every method."""
    root = tmp_path_factory.mktemp("methods")
    for method, ranks in (("rtn", None), ("hqq", None), ("paper", "dense=16,kurtosis=8")):
        options = ["--ranks", ranks] if ranks else []
        arguments = ["quantize", str(bundled_model), "-o", str(root / method), "--method", method, "--quiet", *options]
        assert main(arguments) == 0
    return {method: root / method for method in ("rtn", "hqq", "paper")}


def eval_json(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    capsys.readouterr()
    assert main(["eval", str(folder), "--text", str(TEXT), "--json", "--quiet", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_methods_are_ordered(quantized: dict[str, Path], bundled_model: Path, capsys: pytest.CaptureFixture[str]):
    folders = [bundled_model, quantized["paper"], quantized["hqq"], quantized["rtn"]]
    found = [eval_json(folder, capsys, "--max-windows", "40")["perplexity"] for folder in folders]
    assert found == sorted(found)
    assert found[0] < 30  # the trained model; its unigram perplexity is 915
    assert found[1] - found[0] < 0.7 * (found[2] - found[0])


def test_eval_states_its_protocol(bundled_model: Path, capsys: pytest.CaptureFixture[str]):
    result = eval_json(bundled_model, capsys, "--max-windows", "2")
    assert result["protocol"].startswith("window 512, stride 512")
    assert result["windows"] == 2
    assert result["tokens"] == 1024
    assert main(["eval", str(bundled_model), "--text", str(TEXT), "--max-windows", "1", "--quiet"]) == 0
    assert "protocol: window 512" in capsys.readouterr().out


def test_perplexity_is_the_mean_over_windows_of_new_tokens(bundled_model: Path):
    model = load_model(bundled_model)
    tokens = torch.randint(3, 4096, (1000,), generator=torch.Generator().manual_seed(0))
    found = perplexity(model, tokens, window=256, stride=100)
    losses, scored = [], 0
    with torch.inference_mode():
        for start in range(0, 999, 100):
            end = min(start + 256, 1000)
            logits = model(input_ids=tokens[None, start:end]).logits[0].double().log_softmax(-1)
            new = [i for i in range(start + 1, end) if i >= max(scored, start + 1)]
            if not new:
                break
            losses.append(-sum(float(logits[i - start - 1, tokens[i]]) for i in new) / len(new))
            scored = end
    assert found.windows == len(losses)
    assert found.perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)


def test_stats_feed_the_frequency_policy(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    counts = tmp_path / "counts.json"
    arguments = ["stats", str(bundled_model), "--text", str(TEXT), "-o", str(counts), "--max-windows", "4", "--quiet"]
    assert main(arguments) == 0
    table = read_expert_counts(counts)
    assert len(table) == 4
    assert {sum(row) for row in table.values()} == {4 * 512 * 3}  # windows, tokens, experts a token
    options = ["--ranks", "frequency=16", "--expert-counts", str(counts), "--max-rounds", "1", "--quiet"]
    assert main(["quantize", str(bundled_model), "-o", str(tmp_path / "out"), *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]["routed_expert"]
    assert ranks["mean"] == pytest.approx(16, abs=0.7)
    assert ranks["max"] > ranks["min"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "dense=8", "--method", "hqq"], "--ranks needs compensators, which --method hqq has not"),
        (["--ranks", "nonsense=8"], "unknown policy 'nonsense'"),
        (["--max-rounds", "0"], "--max-rounds must be at least 1"),
        (["--device", "cuda:7"], "torch sees no CUDA device" if not torch.cuda.is_available() else "cuda"),
        (["--ranks", "frequency=8"], "needs --expert-counts"),
        (["--expert-counts", "/nowhere.json"], "/nowhere.json: no such file"),
    ],
)
def test_errors_go_to_stderr(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options, message):
    if "cuda:7" in options and torch.cuda.is_available():
        pytest.skip("a GPU may be there")
    assert main(["quantize", str(bundled_model), "-o", str(tmp_path / "out"), "--quiet", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("milo quantize: error: ")
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_expert_counts_of_another_form(tmp_path: Path):
    (tmp_path / "counts.json").write_text("[1, 2]")
    with pytest.raises(ConversionError, match="no expert_counts; make it with `milo stats"):
        read_expert_counts(tmp_path / "counts.json")


def test_text_that_cannot_be_read(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(bundled_model), "--text", str(tmp_path / "none.txt"), "--quiet"]) == 1
    assert "none.txt: cannot be read as UTF-8 text" in capsys.readouterr().err


def test_summary(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(["quantize", str(bundled_model), "-o", str(out), "--ranks", "dense=1000", "--max-rounds", "1"]) == 0
    captured = capsys.readouterr()
    for part in ("172 matrices in", "MiB", "bits a weight", "peak", "GiB of host memory"):
        assert part in captured.out
    assert "min(N, K)" in captured.err
    assert "layer" in captured.err  # the progress bar
