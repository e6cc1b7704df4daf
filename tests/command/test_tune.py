"""``milo tune``: the shapes of a model's experts, which of them get a file, and what is refused. A GPU is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_families import make_family

from benchmarks.kernels.named_models import named_shape
from vllm_milo.command import main, tune
from vllm_milo.command.expert_layers import expert_shapes
from vllm_milo.kernels import tuned
from vllm_milo.kernels.tuning import tune as searching
from vllm_milo.kernels.tuning.search import Result
from vllm_milo.kernels.weights import MoEShape
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies

SHAPE = MoEShape(64, 6, 2048, 1408, (128, 64), (128, 64))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that is refused, and return the line that it says."""
    assert main(["tune", *words]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MoEShape, float]]:
    """A made-up GPU, on which the heuristic is the best; returns what is tuned, and for how many seconds."""
    found: list[tuple[MoEShape, float]] = []

    def search(
        shape: MoEShape, device: torch.device, seconds: float, dtype: torch.dtype, say: Callable[[str], None]
    ) -> dict[int, Sequence[Result]]:
        found.append((shape, seconds))
        tiles = searching.heuristic_configs(shape.top_k, shape, torch.device("cpu"))
        say("searched")
        return {1: [Result(tiles, 10.0, None)]}

    monkeypatch.setattr(tune, "find_gpu", lambda name: torch.device(name))
    monkeypatch.setattr(tuned, "device_name", lambda device: "Some GPU")
    monkeypatch.setattr(searching, "tune", search)
    return found


def test_a_checkpoint_gets_a_file_that_is_found(checkpoint: Path, tmp_path: Path, gpu, capsys, monkeypatch):
    assert main(["tune", str(checkpoint), "-o", str(tmp_path / "tuned"), "--minutes", "2"]) == 0
    ((shape, seconds),) = gpu
    assert 100 < seconds <= 120
    assert shape == next(iter(expert_shapes(checkpoint)))
    assert shape.ranks == (32, 16)  # rank 8 of gate and of up, each padded to 16, and of down
    printed = capsys.readouterr().out
    assert f"VLLM_TUNED_CONFIG_FOLDER={tmp_path / 'tuned'}" in printed
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path / "tuned"))
    tuned.forget()
    assert tuned.find(shape, 1, torch.device("cuda"), torch.bfloat16) is not None
    tuned.forget()


def test_a_source_model_has_the_shapes_of_what_the_default_makes_of_it(sources: dict[str, Path], gpu, tmp_path):
    assert main(["tune", str(sources["mixtral"]), "-o", str(tmp_path)]) == 0
    config = json.loads((sources["mixtral"] / "config.json").read_text())
    ((shape, _),) = gpu
    assert shape.experts == config["num_local_experts"]
    assert shape.top_k == config["num_experts_per_tok"]
    assert (shape.hidden, shape.intermediate) == (config["hidden_size"], -(-config["intermediate_size"] // 64) * 64)


def test_shards_have_a_share_of_the_intermediate_size():
    shape = SHAPE._replace(ranks=(96, 64))  # gate and up have 48 each: steps of 16
    assert named_shape("deepseek", 1, "fast") == shape
    assert named_shape("deepseek", 2, "fast") == shape._replace(intermediate=704)
    with pytest.raises(ConversionError, match=r"intermediate size of 1408 in groups of 64 cannot be split over 3"):
        named_shape("deepseek", 3)


def test_presets_along_a_text_have_smaller_groups_and_fewer_ranks(sources: dict[str, Path], gpu, tmp_path):
    assert named_shape("deepseek") == SHAPE._replace(groups=(64, 64), ranks=(32, 16))
    for preset in ("balanced", "fast"):
        assert main(["tune", str(sources["mixtral"]), "-o", str(tmp_path), "--preset", preset]) == 0
    (first, _), (second, _) = gpu
    assert (first.groups, second.groups) == ((64, 64), (128, 128))


def test_what_most_layers_have_is_tuned_in_one_file_a_name():
    shapes = {
        SHAPE: 20,
        SHAPE._replace(ranks=(160, 64)): 5,  # of the same classes
        SHAPE._replace(ranks=(64, 64)): 4,
        SHAPE._replace(ranks=(0, 0)): 1,
    }
    assert tune.frequent(shapes) == {SHAPE: 25, SHAPE._replace(ranks=(64, 64)): 4}


def test_minutes_are_shared_by_shapes(gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shapes = {SHAPE: 20, SHAPE._replace(ranks=(0, 0)): 5}
    monkeypatch.setattr(tune, "expert_shapes", lambda *arguments: shapes)
    assert main(["tune", str(tmp_path), "-o", str(tmp_path / "tuned"), "--minutes", "4"]) == 0
    assert [round(seconds) for _, seconds in gpu] == [120, 240], "what one leaves, the next has"
    assert len(list((tmp_path / "tuned").iterdir())) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_machine_without_a_gpu_says_so_in_a_line(checkpoint: Path, capsys):
    assert "torch finds no GPU here" in said(capsys, str(checkpoint))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--device", "cpu"], "tiles are tuned on a GPU"),
        (["--device", "nonsense"], "no device of torch"),
        (["--minutes", "0.1"], "--minutes 0.1: must be from 0.5 to 600"),
        (["--tensor-parallel", "0"], "--tensor-parallel must be at least 1"),
    ],
)
def test_options_are_refused_in_a_line(words: list[str], reason: str, checkpoint: Path, capsys):
    assert reason in said(capsys, str(checkpoint), *words)


def test_a_broken_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, gpu, capsys):
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    for file in broken.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert "truncated" in said(capsys, str(broken))
    (broken / "config.json").unlink()
    assert "config.json" in said(capsys, str(broken))
    assert gpu == []


def test_shapes_of_experts_without_a_gate(tmp_path: Path):
    """Their first GEMM has one part, and they are as wide as their latent."""
    source = make_family("nemotron_h", tmp_path / "source")
    out = convert(source, tmp_path / "out", Conversion(Recipe(max_rounds=1), parse_policies("uniform=16"))).out
    (shape,) = expert_shapes(out)
    assert (shape.parts, shape.hidden, shape.intermediate, shape.ranks) == (1, 64, 192, (16, 16))
