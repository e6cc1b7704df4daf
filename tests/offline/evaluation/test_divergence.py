"""How far a checkpoint is from its source: the streamed measure against whole models in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config
from tiny_models import VOCABULARY, make_model

from vllm_milo.offline.cli import main
from vllm_milo.offline.evaluation import divergence as module
from vllm_milo.offline.evaluation.divergence import divergence, divergences, open_streamed, states_device
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.router_choices import changed_choices, router_choices
from vllm_milo.offline.source.streamed_model import StreamedModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundled_checkpoint(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("divergence") / "hqq"
    assert main(["quantize", str(bundled_model), "-o", str(out), "--method", "hqq", "--quiet"]) == 0
    return out


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_streamed_scores_are_those_of_whole_models(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, out = make_model(family, tmp_path / "source"), tmp_path / "out"
    arguments = ["--method", "paper", "--ranks", "uniform=8", "--max-rounds", "1"]
    assert main(["quantize", str(source), "-o", str(out), "--quiet", *arguments]) == 0
    windows = torch.randint(0, 256, (5, 24))
    with torch.no_grad():
        found, wanted = (load_model(folder)(windows).logits.double() for folder in (out, source))
    left, right = found.log_softmax(-1), wanted.log_softmax(-1)
    for batch in (2, 8):
        monkeypatch.setattr(module, "BATCH", batch)
        model, reference = (open_streamed(folder, CPU, torch.float32) for folder in (out, source))
        scores = divergence(model, reference, windows)
        assert scores.kl == pytest.approx(float((right.exp() * (right - left)).sum(-1).mean()), rel=1e-3, abs=1e-7)
        assert scores.top1 == pytest.approx(float((left.argmax(-1) == right.argmax(-1)).float().mean()))
        for perplexity, table in ((scores.perplexity, left), (scores.reference_perplexity, right)):
            losses = -table[:, :-1].gather(-1, windows[:, 1:, None])
            assert perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-4)
        assert (scores.windows, scores.tokens) == (5, 120)
    whole = divergence(model, reference, windows)
    monkeypatch.setattr(module, "LOGITS", 7 * VOCABULARY)  # a window in parts of 7 positions
    assert divergence(model, reference, windows) == pytest.approx(whole, rel=1e-5)


@pytest.fixture
def pair(sources: dict[str, Path], checkpoint: Path) -> list[StreamedModel]:
    """A checkpoint and its source."""
    return [open_streamed(folder, CPU, torch.float32) for folder in (checkpoint, sources["qwen2_moe"])]


def test_texts_in_one_pass_score_as_each_alone(pair: list[StreamedModel]):
    texts = torch.randint(0, VOCABULARY, (5, 24)).split([2, 3])
    found = divergences(*pair, texts)
    assert [of.windows for of in found] == [2, 3]
    assert found[0].kl != found[1].kl
    for of, text in zip(found, texts, strict=True):
        assert divergence(*pair, text) == pytest.approx(of, rel=1e-5)


def test_one_layer_is_in_memory(pair: list[StreamedModel], monkeypatch: pytest.MonkeyPatch):
    def held() -> int:
        layers = (layer for model in pair for layer in model._model.model.layers)
        return sum(any(p.device.type != "meta" for p in layer.parameters()) for layer in layers)

    seen = []
    for model in pair:
        run = model.run
        monkeypatch.setattr(model, "run", lambda *arguments, run=run: (seen.append(held()), run(*arguments))[1])
    divergence(*pair, torch.randint(0, VOCABULARY, (2, 24)))
    assert seen == [1] * (2 * 2)  # layers, models
    assert held() == 0


@pytest.mark.gpu
def test_hidden_states_on_the_host_or_the_gpu(
    sources: dict[str, Path], checkpoint: Path, pair: list[StreamedModel], monkeypatch: pytest.MonkeyPatch
):
    windows = torch.randint(0, VOCABULARY, (5, 24))
    expected = divergence(*pair, windows)
    on_gpu = [
        open_streamed(folder, torch.device("cuda"), torch.float32) for folder in (checkpoint, sources["qwen2_moe"])
    ]
    for share, home in ((0.0, "cpu"), (1.0, "cuda")):
        monkeypatch.setattr(module, "STATES_SHARE", share)
        assert states_device(on_gpu[0], windows).type == home
        assert divergence(*on_gpu, windows) == pytest.approx(expected, rel=1e-2)


def test_a_model_does_not_differ_from_itself(bundled_model: Path):
    windows = torch.randint(3, 4000, (2, 32))
    model, reference = (open_streamed(bundled_model, CPU, torch.float32) for _ in "ab")
    scores = divergence(model, reference, windows)
    assert scores.kl == 0
    assert scores.top1 == 1
    assert scores.router_flips == 0


def sets_of_experts(folder: Path, windows: torch.Tensor) -> list[list[set[int]]]:
    """The experts of every token, a list a layer, of a whole model in memory."""
    model, found = load_model(folder), []
    for name, part in model.named_modules():
        if name.endswith(".experts"):
            part.register_forward_pre_hook(lambda _, args: found.append([set(row.tolist()) for row in args[1]]))
    with torch.no_grad():
        model(windows)
    return found


def test_router_flips_are_tokens_with_other_sets_of_experts(pair: list[StreamedModel], monkeypatch: pytest.MonkeyPatch):
    windows = torch.randint(0, VOCABULARY, (5, 24))
    monkeypatch.setattr(module, "BATCH", 2)
    mine, theirs = (sets_of_experts(one.folder, windows) for one in pair)
    assert len(mine) == 1  # the other layer is dense
    changed = [a != b for left, right in zip(mine, theirs, strict=True) for a, b in zip(left, right, strict=True)]
    assert 0 < sum(changed) < len(changed)
    assert divergence(*pair, windows).router_flips == pytest.approx(sum(changed) / len(changed), abs=0.01)
    by_text = divergences(*pair, windows.split([2, 3]))
    assert by_text[0].router_flips == pytest.approx(sum(changed[:48]) / 48, abs=0.02)
    assert by_text[1].router_flips == pytest.approx(sum(changed[48:]) / 72, abs=0.02)


def test_router_flips_are_unknown_without_routers_or_with_other_numbers_of_experts():
    choices = [torch.tensor([[0, 1], [1, 2]])]
    assert changed_choices([], [], 1) is None
    assert changed_choices(choices, [choices[0][:, :1]], 1) is None
    assert changed_choices(choices, [torch.tensor([[0, 1], [0, 2]])], 1).tolist() == [0.5]
    assert changed_choices(choices, [torch.tensor([[0, 1], [0, 2]])], 2).tolist() == [0, 1]
    with router_choices(torch.nn.Sequential(torch.nn.Linear(2, 2)), CPU) as seen:
        pass
    assert seen == []


def test_the_command_takes_several_texts(
    bundled_model: Path, bundled_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other.txt"
    other.write_text("The old man went to the market. " * 200)
    texts = [str(Path(__file__).parents[2] / "assets" / "valid.txt"), str(other)]
    arguments = ["eval", str(bundled_checkpoint), "--reference", str(bundled_model), "--text", *texts, "--quiet"]
    arguments += ["--max-windows", "2", "--window", "64"]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in said["texts"]] == texts
    assert all(row["kl"] > 0.01 and 0 < row["top1"] < 1 and row["windows"] == 2 for row in said["texts"])
    assert all(0 < row["router_flips"] < 1 for row in said["texts"])
    assert said["mean_kl"] == pytest.approx(sum(row["kl"] for row in said["texts"]) / 2)
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "top-1" in table
    assert f"{said['texts'][0]['kl']:.4f}" in table
    assert f"{said['texts'][0]['router_flips']:.4f}" in table
    assert "flips: share of the tokens" in table


def test_bad_references_and_texts_are_refused(
    bundled_model: Path, bundled_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    other = Path(shutil.copytree(bundled_model, tmp_path / "other"))
    edit_config(other, vocab_size=17)
    text = str(Path(__file__).parents[2] / "assets" / "valid.txt")

    def refused(message: str, *options: str) -> None:
        assert main(["eval", str(bundled_checkpoint), "--quiet", *options]) == 1
        assert message in capsys.readouterr().err

    reference = ("--reference", str(bundled_model))
    refused("is a MiLo checkpoint", "--reference", str(bundled_checkpoint), "--text", text)
    refused("vocab_size is 17 there", "--reference", str(other), "--text", text)
    refused(
        "has 0 tokens, and a window takes 512; give a longer text or a smaller --window",
        *reference,
        "--text",
        str(empty),
    )
    refused("cannot be read as UTF-8 text", *reference, "--text", str(binary))
    refused("cannot be read as UTF-8 text", *reference, "--text", str(tmp_path / "absent.txt"))
    refused("--max-windows must be at least 1", *reference, "--text", text, "--max-windows", "0")
    for file in other.glob("token*"):
        file.unlink()
    edit_config(other, vocab_size=4096)
    refused("holds no tokenizer", "--reference", str(other), "--text", text)
