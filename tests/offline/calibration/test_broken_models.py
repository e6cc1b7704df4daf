"""Models whose weights or activations are not numbers: said at once, and of which tensor or module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from refusals import FAST, WEIGHTS, refused
from tiny_models import VOCABULARY

from vllm_milo.offline.along import layers as along_text
from vllm_milo.offline.calibration.sequential import SequentialPass
from vllm_milo.offline.checkpoint.report import REPORT_NAME, Report
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Kind, Matrix
from vllm_milo.offline.source.finite import is_finite
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, reader_tensors
from vllm_milo.validation import validate_checkpoint

NAN, INF = float("nan"), float("inf")
WINDOWS = torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))


def along(windows: torch.Tensor = WINDOWS, steps: int = 1) -> Conversion:
    return Conversion(FAST, text=Text("random", windows, LearnOptions(steps=steps, batch=2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_numbers_are_told_from_what_is_none(dtype: torch.dtype):
    values = torch.linspace(-9, 9, 1000).to(dtype)
    assert is_finite(values)
    assert is_finite(values[:0])
    for broken in (NAN, INF, -INF):
        for place in (0, 517, 999):
            changed = values.float()
            changed[place] = broken
            if dtype != torch.float8_e4m3fn or broken != broken:  # which has no Inf
                assert not is_finite(changed.to(dtype))
    assert is_finite(torch.arange(4))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("broken", [NAN, -INF])
def test_broken_weights_are_found_before_the_first_layer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: float
):
    monkeypatch.setattr(SequentialPass, "visit", lambda *_: pytest.fail("a layer was begun"))
    edit_tensors(source, WEIGHTS, lambda tensors: tensors[name].view(-1)[5].fill_(broken))
    refused(source, tmp_path / "out", rf"tensor {name} holds NaN or Inf; the source model is broken", along())


def test_a_broken_model_does_not_write(bundled_model: Path, tmp_path: Path, capsys):
    folder, name = Path(shutil.copytree(bundled_model, tmp_path / "model")), "model.layers.3.mlp.gate.weight"
    edit_tensors(folder, WEIGHTS, lambda tensors: tensors[name].view(-1)[5].fill_(NAN))
    assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), "--calibration", "self"]) == 1
    assert f"tensor {name} holds NaN or Inf" in capsys.readouterr().err


def huge(folder: Path, name: str) -> None:
    """Make a matrix so large that what it puts out overflows, also in float32."""
    edit_tensors(folder, WEIGHTS, lambda tensors: tensors[name].fill_(3e38))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("self_attn.v_proj", "self_attn.v_proj"),
        ("self_attn.o_proj", "self_attn.o_proj"),
        ("block_sparse_moe.experts.2.w2", "block_sparse_moe.experts"),
    ],
)
def test_activations_of_the_model_that_overflow_are_named(source: Path, tmp_path: Path, name: str, module: str):
    huge(source, f"model.layers.1.{name}.weight")
    message = (
        rf"model\.layers\.1: its hidden states hold NaN or Inf on window \d of the calibration text, at first in what "
        rf"model\.layers\.1\.{module} puts out \(torch.float32\); is the source model broken\? .* --calibration none"
    )
    refused(source, tmp_path / "out", message, along())


def test_float16_that_overflows_gets_its_own_advice(source: Path):
    reader = ModelReader(source)
    tensors = reader_tensors(reader.load, reader.tensors)
    model = StreamedModel(source, reader.family, tensors, torch.device("cpu"), torch.float16)
    stream = SequentialPass(model, reader.family, WINDOWS)
    module = model.layer(0)
    model.layer = lambda index: module
    module.self_attn.o_proj.weight.data.fill_(6e4)
    message = r"layers\.0: .* \S+0\.self_attn\.o_proj puts out \(torch\.float16\); float16 ends at 65504: .*bfloat16"
    with pytest.raises(ConversionError, match=message):
        stream.visit(0)


@pytest.mark.parametrize("window", [0, 3])
def test_the_window_is_named(source: Path, window: int):
    reader = ModelReader(source)
    tensors = reader_tensors(reader.load, reader.tensors)
    stream = SequentialPass(
        StreamedModel(source, reader.family, tensors, torch.device("cpu"), torch.float32), reader.family, WINDOWS, 2
    )
    stream.original = stream.original.clone()
    stream.original[window, 7] = 1e30  # whose square is infinite
    stream.original[window, 7, 0] = NAN
    with pytest.raises(ConversionError, match=rf"on window {window} of .* at first in what .*input_layernorm puts out"):
        stream.visit(0)


def test_activations_of_quantized_layers_are_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def spoil(model, index, module, solved, *_):
        for matrix, one in solved.items():
            if matrix.name == "model.layers.1.self_attn.k_proj":
                one.base.scale.fill_(INF)
        return solved, Report()

    monkeypatch.setattr(along_text, "learn_layer", spoil)
    monkeypatch.setattr(Report, "_asdict", lambda self: {"untrained_experts": []}, raising=False)
    message = (
        r"model\.layers\.1: quantized, its hidden states hold NaN or Inf on window 0 of the calibration text, at first "
        r"in what model\.layers\.1\.self_attn\.k_proj puts out .*; give it more bits"
    )
    refused(source, tmp_path / "out", message, along())


def test_a_tokenizer_of_another_model_is_refused(bundled_model: Path, tmp_path: Path, capsys):
    folder, out = Path(shutil.copytree(bundled_model, tmp_path / "model")), tmp_path / "out"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()

    edit_tensors(folder, WEIGHTS, cut)
    edit_config(folder, vocab_size=300)
    assert main(["quantize", str(folder), "-o", str(out), "--quiet", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "and config.json states vocab_size 300; is the tokenizer another model's?" in error
    assert not out.exists()


@pytest.mark.parametrize("steps", [0, 2])
def test_experts_without_a_token_are_counted(sources: dict[str, Path], tmp_path: Path, steps: int):
    """Of the same token everywhere each layer sees the same state, which goes to as many experts as one token does."""
    windows = torch.full((4, 32), 7)
    summary = convert(sources["olmoe"], tmp_path / "out", along(windows, steps), progress=False)
    validate_checkpoint(summary.out)
    unseen = json.loads((summary.out / REPORT_NAME).read_text())["experts_without_tokens"]
    for layer in range(2):
        names = [name for name in unseen if name.startswith(f"model.layers.{layer}.mlp.experts.")]
        assert len(set(names)) == 5 - 2
    assert len(unseen) == 6
    [warning] = summary.warnings
    assert warning.startswith("6 routed experts saw not one token of the calibration text and are quantized as without")
    assert f"e.g. {unseen[0]};" in warning


def test_experts_with_and_without_tokens_are_told_apart():
    report = Report()
    matrices = [Matrix(f"e.{e}.{leaf}", Kind.ROUTED_EXPERT, 8, 8, "e", e) for e in range(4) for leaf in ("up", "down")]
    seen = {matrix.name: 50 * (matrix.expert or 0) for matrix in matrices}
    report.note_tokens([*matrices, Matrix("q_proj", Kind.ATTENTION, 8, 8)], seen)
    assert report.unseen == ["e.0"]
    report.layers["layer"] = {"untrained_experts": ["e.0.up", "e.0.down", "e.1.up", "e.2.up"]}
    without, few = report.warnings
    assert without.startswith("1 routed experts saw not one token")
    assert few.startswith("2 routed experts saw too little")
    assert "experts_without_tokens" not in Report().to_dict()
