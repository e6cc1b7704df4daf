"""Every kind of model, text and option that `milo eval` refuses: what is wrong, where, and what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from refusals import WEIGHTS
from tiny_models import TEXT, VOCABULARY

from vllm_milo.offline.cli import main
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.divergence import divergence, open_streamed


@pytest.fixture
def model(bundled_model: Path, tmp_path: Path) -> Path:
    """The bundled model of its own, to be broken."""
    return Path(shutil.copytree(bundled_model, tmp_path / "model"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Asserts that `milo eval` fails with a message."""

    def check(message: str, model: Path, *options: Path | str) -> None:
        command = ["eval", model, "--window", "48", "--max-windows", "3", "--device", "cpu", "--quiet", *options]
        assert main([*map(str, command)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("milo eval: error: ")
        assert re.search(message, error), error

    return check


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--max-windows", "0"], "--max-windows must be at least 1"),
        (["--window", "1"], "--window 1: must be at least 2"),
        (["--stride", "0"], "--stride 0: must be from 1 to the window of 48 tokens"),
        (["--stride", "49"], "--stride 49: must be from 1 to the window of 48 tokens"),
        (["--text", "/dev/zero"], "/dev/zero: is a device; give a file of UTF-8 text"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--device", "nonsense"], "--device nonsense: torch knows no such device"),
    ],
)
def test_options_that_leave_nothing_to_do(bundled_model: Path, refused, compared, changes, message):
    options = ["--reference", bundled_model] if compared else []
    refused(message, bundled_model, "--text", TEXT, *options, *changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text\.txt: cannot be read as UTF-8 text: .*No such file"),
        (b"", r"text\.txt: has 0 tokens, and a window takes 48"),
        (b"\n", r"text\.txt: has \d tokens, and a window takes 48"),
        (
            b"In the morning",
            r"text\.txt: has \d tokens, and a window takes 48; give a longer text or a smaller --window",
        ),
        (b"\xff\xfe\x80" * 99, r"text\.txt: cannot be read as UTF-8 text"),
        (
            b"PK\x03\x04\x00\x00" * 99,
            r"text\.txt: cannot be read as UTF-8 text: it is a zip archive or an",
        ),
        (b"\x7fELF\x00\x00" * 99, r"text\.txt: holds zero bytes, as binary files do"),
    ],
)
def test_texts_that_cannot_be_scored(bundled_model: Path, tmp_path: Path, refused, content: bytes | None, message: str):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    refused(message, bundled_model, "--reference", bundled_model, "--text", TEXT, text)


def test_folders_that_are_not_there(bundled_model: Path, tmp_path: Path, refused):
    none, message = tmp_path / "none", "none: no such folder; download or convert the model first"
    refused(message, none, "--reference", bundled_model, "--text", TEXT)
    refused(message, bundled_model, "--reference", none, "--text", TEXT)
    refused(message, none, "--text", TEXT)


def test_model_and_reference_exchanged(bundled_model: Path, checkpoint: Path, refused):
    said = rf"--reference {checkpoint}: is a MiLo checkpoint, and {bundled_model} is none; exchange the two"
    refused(said, bundled_model, "--reference", checkpoint, "--text", TEXT)
    said = rf"--reference {checkpoint}: is a MiLo checkpoint; give the model that it was made of"
    refused(said, checkpoint, "--reference", checkpoint, "--text", TEXT)


def test_quantized_reference(bundled_model: Path, model: Path, refused):
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    refused("model is quantized already .gptq.", bundled_model, "--reference", model, "--text", TEXT)


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 999), ("hidden_size", 64), ("num_hidden_layers", 3), ("model_type", "mixtral")]
)
def test_models_of_other_sizes(bundled_model: Path, model: Path, refused, key: str, value: int | str):
    edit_config(model, **{key: value})
    message = rf"model: {key} is {value!r} there and .*; give the model that it was made of"
    refused(message, bundled_model, "--reference", model, "--text", TEXT)


def test_no_tokenizer(bundled_model: Path, model: Path, refused):
    for file in model.glob("tokenizer*"):
        file.unlink()
    for folders in ((model, bundled_model), (bundled_model, model)):
        refused("model: holds no tokenizer", folders[0], "--reference", folders[1], "--text", TEXT)


def test_another_tokenizer(bundled_model: Path, model: Path, refused):
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:500]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    message = r"valid\.txt: the tokenizers of .* read it as different tokens; give the model that it was made of"
    refused(message, model, "--reference", bundled_model, "--text", TEXT)


@pytest.mark.parametrize("compared", [False, True])
def test_a_tokenizer_of_more_tokens_than_the_model(model: Path, refused, compared: bool):
    edit_config(model, vocab_size=1000)
    few = "model.embed_tokens.weight"
    edit_tensors(model, WEIGHTS, lambda tensors: tensors.update({few: tensors[few][:1000].clone()}))
    message = r"model: its tokenizer reads the text as token \d+, and config\.json states vocab_size 1000; is the token"
    refused(message, model, "--text", TEXT, *(["--reference", model] if compared else []))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.gate.weight", "nan", r"model: tensor model\.layers\.1\.mlp\.gate\.weight holds NaN"),
        ("model.norm.weight", "inf", r"the predictions of .*model beside .* are not finite in torch\.float32"),
    ],
)
def test_weights_that_are_no_numbers(bundled_model: Path, model: Path, refused, name: str, value: str, message: str):
    edit_tensors(model, WEIGHTS, lambda tensors: tensors[name].fill_(float(value)))
    refused(message, model, "--reference", bundled_model, "--text", TEXT)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({NORM: torch.ones(1)}), rf"broken: tensor {NORM} has shape \[1\], but by config.json it"),
        (lambda t: t.pop(NORM), rf"broken: model\.layers\.1: transformers needs \['{NORM}'\], which .* lack"),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name and ".experts.5." in name],
            r"broken: model\.layers\.1: transformers needs .*experts.* as a whole or in part; only models that transf",
        ),
        (
            lambda t: t.update({"model.layers.0.extra": torch.ones(1)}),
            "broken: model.layers.0.extra: transformers has no such parameter; only models that transformers runs can",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][1:].clone()}),
            "broken: tensor lm_head.weight has shape .*, but by config.json it must have",
        ),
        (lambda t: t.pop("lm_head.weight"), "broken: lm_head.weight: missing; are the model's files complete"),
    ],
)
def test_checkpoints_that_transformers_cannot_run(sources, checkpoint: Path, tmp_path: Path, edit, message: str):
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    edit_tensors(broken, "model-00001-of-00001.safetensors", edit)
    with pytest.raises(ConversionError, match=message):
        divergence(
            *(open_streamed(folder, torch.device("cpu"), torch.float32) for folder in (broken, sources["qwen2_moe"])),
            torch.randint(3, VOCABULARY, (2, 16)),
        )
