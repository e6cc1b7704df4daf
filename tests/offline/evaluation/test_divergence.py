"""A model beside its reference, a layer at a time: the same scores as from two whole models in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from refusals import WEIGHTS
from tiny_models import TEXT, VOCABULARY

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.offline.checkpoint.dequantize import dequantized_tensors
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation import divergence
from vllm_milo.offline.evaluation.comparison import Options, open_pair
from vllm_milo.offline.evaluation.divergence import compare, window_scores
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.validation import validate_checkpoint

CPU = torch.device("cpu")
SHORT = Options(window=48, max_windows=3)


@pytest.fixture(scope="module")
def converted(sources: dict[str, Path], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MiLo checkpoint by family."""
    conversion = Conversion(Recipe(max_rounds=1), parse_policies("dense=16,sparse=8"))
    out = tmp_path_factory.mktemp("converted") / "mixtral"
    return {"mixtral": convert(sources["mixtral"], out, conversion, progress=False).out, "qwen2_moe": checkpoint}


@pytest.fixture(scope="module")
def quantized(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with codes alone."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    return convert(bundled_model, out, Conversion(Recipe(method="rtn", max_rounds=1)), progress=False).out


@pytest.fixture
def model(bundled_model: Path, tmp_path: Path) -> Path:
    """The bundled model of its own, to be broken."""
    return Path(shutil.copytree(bundled_model, tmp_path / "model"))


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (5, 40), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def whole(candidate: Path, reference: Path, windows: torch.Tensor) -> list[torch.Tensor]:
    """The four scores of each window by whole models in float64."""
    ours, theirs = (
        load_model(folder)(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
        for folder in (candidate, reference)
    )
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    same = (theirs.argmax(-1) == ours.argmax(-1)).double()
    losses = [-table.gather(2, windows[:, 1:, None])[..., 0] for table in (ours, theirs)]
    return [values.mean(1) for values in (kl, same, *losses)]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_scores_are_those_of_whole_models(family: str, sources, converted, windows: torch.Tensor):
    candidate, reference = converted[family], sources[family]
    found = window_scores(open_pair(candidate, reference, CPU, torch.float32), windows)
    assert found.kl.min() > 1e-3  # far from the tolerance
    assert found.top1.min() < 1
    for name, values, expected in zip(found._fields, found, whole(candidate, reference, windows), strict=True):
        torch.testing.assert_close(values, expected, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_scores_do_not_depend_on_what_runs_at_once(
    sources, converted, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    pair = open_pair(converted["mixtral"], sources["mixtral"], CPU, torch.float32)
    expected = window_scores(pair, windows)
    monkeypatch.setattr(divergence, "LOGITS", 7 * VOCABULARY)  # windows of 39 scored tokens in parts of 7
    for batch in (1, 2):
        for values, others in zip(window_scores(pair, windows, batch), expected, strict=True):
            torch.testing.assert_close(values, others, atol=1e-5, rtol=1e-5)
    alone = window_scores(pair, windows[2:3])
    for values, others in zip(alone, expected, strict=True):
        torch.testing.assert_close(values, others[2:3], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_hidden_states_on_the_host_or_the_gpu(sources, converted, windows: torch.Tensor, monkeypatch):
    expected = whole(converted["mixtral"], sources["mixtral"], windows)
    pair = open_pair(converted["mixtral"], sources["mixtral"], torch.device("cuda"), torch.float32)
    for share, home in ((0.0, "cpu"), (1.0, "cuda")):
        monkeypatch.setattr(divergence, "STATES_SHARE", share)
        assert divergence.states_home(pair.reference, windows).type == home
        for values, others in zip(window_scores(pair, windows), expected, strict=True):
            torch.testing.assert_close(values, others, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_at_no_distance_from_itself(bundled_model: Path, dtype: torch.dtype):
    (found,) = compare(bundled_model, bundled_model, [TEXT], Options(window=48, max_windows=2, dtype=dtype))
    assert (found.kl, found.top1) == (0, 1)
    assert found.perplexity == found.reference_perplexity
    assert (found.windows, found.tokens) == (2, 2 * 47)


def test_at_most_one_layer_is_in_memory(sources, converted, windows, monkeypatch: pytest.MonkeyPatch):
    pair = open_pair(converted["mixtral"], sources["mixtral"], CPU, torch.float32)

    def held() -> int:
        layers = (layer for model in pair[:2] for layer in model._model.model.layers)
        return sum(any(p.device != torch.device("meta") for p in layer.parameters()) for layer in layers)

    seen = []
    for model in pair[:2]:
        run = model.run
        monkeypatch.setattr(model, "run", lambda *arguments, run=run: (seen.append(held()), run(*arguments))[1])
    window_scores(pair, windows, batch=2)
    assert seen == [1] * (2 * 2 * 3)  # layers, models, batches
    assert held() == 0


def test_dequantized_tensors_by_prefix(converted):
    folder = converted["mixtral"]
    fmt = validate_checkpoint(folder)
    everything = dict(dequantized_tensors(folder, fmt, torch.float32))
    for prefix in ("model.layers.1.", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "nothing"):
        found = dict(dequantized_tensors(folder, fmt, torch.float32, prefix))
        assert found.keys() == {name for name in everything if name.startswith(prefix)}
        assert all(torch.equal(values, everything[name]) for name, values in found.items())


def test_several_texts_are_scored_as_each_alone(bundled_model: Path, quantized: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text(encoding="utf-8")[5000:9000], encoding="utf-8")
    both = compare(quantized, bundled_model, [TEXT, other], SHORT)
    alone = compare(quantized, bundled_model, [other], SHORT)[0]
    assert [of.text for of in both] == [str(TEXT), str(other)]
    assert both[0].kl != both[1].kl
    assert both[1].kl == pytest.approx(alone.kl, abs=1e-6)
    assert both[1].reference_perplexity == pytest.approx(alone.reference_perplexity, rel=1e-6)
    assert both[1].perplexity != pytest.approx(both[1].reference_perplexity, rel=1e-6)


def test_command_line(bundled_model: Path, quantized: Path, capsys: pytest.CaptureFixture[str]):
    command = ["eval", str(quantized), "--reference", str(bundled_model), "--text", str(TEXT), str(TEXT), "--quiet"]
    command += ["--max-windows", "2", "--window", "48", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["reference"]) == (str(quantized), str(bundled_model))
    keys = {"text", "kl", "top1", "perplexity", "reference_perplexity", "windows", "tokens"}
    assert [set(row) for row in found["texts"]] == [keys, keys]
    assert found["mean_kl"] == pytest.approx(found["texts"][0]["kl"])
    assert main(command) == 0
    head, first, _, mean, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["text", "KL", "top-1", "perplexity", "reference's", "windows", "tokens"]
    assert first.split()[:2] == [str(TEXT), f"{found['mean_kl']:.4f}"]
    assert mean.split() == ["mean", f"{found['mean_kl']:.4f}"]
    assert head.index("top-1") + len("top-1") == first.index(first.split()[2]) + len(first.split()[2])  # aligned
    assert note == f"KL in nats a token from {bundled_model}; disjoint windows of 48 tokens; float32"


@pytest.mark.parametrize("options", [[], ["--reference"]])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--max-windows", "0"], "--max-windows 0: must be at least 1"),
        (["--window", "1"], "window 1"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees no such CUDA device"),
        (["--device", "nonsense"], "--device nonsense: torch knows no such device"),
    ],
)
def test_options_that_leave_nothing_to_do(bundled_model: Path, capsys, options, changes, message):
    options = [*options, str(bundled_model)] if options else []
    assert main(["eval", str(bundled_model), "--text", str(TEXT), "--quiet", *options, *changes]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("milo eval: error: ")
    assert message in error


def test_stride_is_for_perplexity_alone(bundled_model: Path, capsys):
    command = ["eval", str(bundled_model), "--text", str(TEXT), "--reference", str(bundled_model), "--stride", "8"]
    assert main(command) == 1
    assert "--stride: windows are disjoint with --reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text\.txt: cannot be read as UTF-8 text: .*No such file"),
        (b"", r"text\.txt: is empty; give a text of at least 48 tokens"),
        (b" \n", r"text\.txt: is empty"),
        (
            b"In the morning",
            r"text\.txt: has \d tokens, and a window takes 48; give a longer text or a smaller --window",
        ),
        (b"\xff\xfe\x80" * 99, r"text\.txt: cannot be read as UTF-8 text"),
        (b"PK\x03\x04\x00\x00" * 99, r"text\.txt: holds zero bytes, as binary files do"),
    ],
)
def test_texts_that_cannot_be_scored(bundled_model: Path, tmp_path: Path, content: bytes | None, message: str):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        compare(bundled_model, bundled_model, [TEXT, text], SHORT)


def test_folders_that_are_not_there(bundled_model: Path, tmp_path: Path, capsys):
    for folders in ((tmp_path / "none", bundled_model), (bundled_model, tmp_path / "none")):
        with pytest.raises(ConversionError, match="none: no such folder; download or convert the model first"):
            compare(*folders, [TEXT], SHORT)
    assert main(["eval", str(tmp_path / "none"), "--text", str(TEXT), "--quiet"]) == 1
    assert "none: no such folder" in capsys.readouterr().err


def test_quantized_reference(bundled_model: Path, quantized: Path):
    with pytest.raises(ConversionError, match="the reference is quantized; give the original model as --reference"):
        compare(bundled_model, quantized, [TEXT], SHORT)


def test_candidate_of_another_quantization(bundled_model: Path, model: Path):
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="not a MiLo checkpoint"):
        compare(model, bundled_model, [TEXT], SHORT)


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 999), ("hidden_size", 64), ("num_hidden_layers", 3), ("model_type", "mixtral")]
)
def test_models_of_other_sizes(bundled_model: Path, model: Path, key: str, value: int | str):
    edit_config(model, **{key: value})
    with pytest.raises(ConversionError, match=rf"model/config\.json: {key} is {value}, but \w+ in .*; give as --refer"):
        compare(model, bundled_model, [TEXT], SHORT)


def test_no_tokenizer(bundled_model: Path, model: Path):
    for file in model.glob("tokenizer*"):
        file.unlink()
    for folders in ((model, bundled_model), (bundled_model, model)):
        with pytest.raises(ConversionError, match="model: holds no tokenizer"):
            compare(*folders, [TEXT], SHORT)


def test_another_tokenizer(bundled_model: Path, model: Path):
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:500]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ConversionError, match=r"its tokenizer differs from that of .*, first at token \d+ of .*valid"):
        compare(model, bundled_model, [TEXT], SHORT)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.gate.weight", "nan", r"model: tensor model\.layers\.1\.mlp\.gate\.weight holds NaN"),
        ("model.norm.weight", "inf", "model: logits hold NaN or Inf in torch.float32; use another --dtype"),
    ],
)
def test_weights_that_are_no_numbers(bundled_model: Path, model: Path, name: str, value: str, message: str):
    edit_tensors(model, WEIGHTS, lambda tensors: tensors[name].fill_(float(value)))
    with pytest.raises(ConversionError, match=message):
        compare(model, bundled_model, [TEXT], SHORT)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({NORM: torch.ones(1)}), rf"broken: tensor {NORM} has shape \[1\], but by config.json it"),
        (lambda t: t.pop(NORM), rf"broken: model\.layers\.1: transformers needs \['{NORM}'\], which .* lack"),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name and ".experts.3." in name],
            r"broken: model\.layers\.0: transformers needs .*experts.* as a whole or in part; only models that transf",
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
def test_checkpoints_that_transformers_cannot_run(sources, converted, tmp_path: Path, windows, edit, message: str):
    broken = Path(shutil.copytree(converted["mixtral"], tmp_path / "broken"))
    edit_tensors(broken, "model-00001-of-00001.safetensors", edit)
    with pytest.raises(ConversionError, match=message):
        window_scores(open_pair(broken, sources["mixtral"], CPU, torch.float32), windows)
