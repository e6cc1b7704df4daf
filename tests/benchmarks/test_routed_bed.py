"""A model that routes, made of the bundled one with all its experts active."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import routed_bed
from benchmarks.router_training import imbalance
from vllm_milo.offline.source.reader import ModelReader

Run = Callable[..., str]


@pytest.fixture
def unrouted(bundled_model: Path, tmp_path: Path) -> Path:
    """The bundled model with routers of 0 and all 12 experts active."""
    folder = Path(shutil.copytree(bundled_model, tmp_path / "unrouted"))
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith((".mlp.gate.weight", "shared_expert_gate.weight")):
            values.zero_()
        elif ".experts." in name and name.endswith("down_proj.weight"):
            values.mul_(4)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 12}))
    return folder


@pytest.fixture
def run(unrouted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*options: str) -> str:
        always = [str(unrouted), "--device", "cpu", "--batch", "2", "--measure-windows", "4"]
        monkeypatch.setattr(sys, "argv", ["routed_bed", *always, *options])
        monkeypatch.setattr(routed_bed, "MANY", 64)
        monkeypatch.setattr(routed_bed, "FIRST_WINDOWS", 8)
        routed_bed.main()
        return capsys.readouterr().out

    return command


def kl(said: str) -> float:
    return float(re.findall(r"KL (\d\.\d+), top-1", said)[0])


def test_training_brings_the_model_closer_and_saved_tensors_make_it_again(run: Run, unrouted: Path, tmp_path: Path):
    untrained = run("-o", str(tmp_path / "untrained"), "--steps", "0")
    out, again, saved = tmp_path / "out", tmp_path / "again", tmp_path / "trained.safetensors"
    said = run("-o", str(out), "--steps", "40", "--rate", "6", "--save", str(saved))
    assert kl(said) < 0.8 * kl(untrained)
    assert "least used expert 0.0" in said
    repeated = run("-o", str(again), "--apply", str(saved))
    assert kl(repeated) == kl(said)
    assert saved.stat().st_size < 200_000
    config = json.loads((out / "config.json").read_text())
    assert (config["num_experts_per_tok"], config["norm_topk_prob"]) == (6, True)
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    source = load_file(unrouted / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in source)
    changed = {name for name in source if not torch.equal(first[name], source[name])}
    assert all(re.search(r"norm\.|mlp\.gate|shared_expert_gate|experts\.\d+\.down", name) for name in changed)
    assert len(ModelReader(out).matrices) == len(ModelReader(unrouted).matrices)


def test_another_models_tensors_are_refused(run: Run, tmp_path: Path):
    save_file({"model.layers.99.mlp.gate.weight": torch.zeros(2)}, tmp_path / "trained.safetensors")
    with pytest.raises(SystemExit, match=r"has no model\.layers\.99\.mlp\.gate\.weight"):
        run("-o", str(tmp_path / "out"), "--apply", str(tmp_path / "trained.safetensors"))


def test_imbalance_is_0_where_experts_are_used_alike_and_grows():
    even = torch.stack([torch.arange(4), (torch.arange(4) + 1) % 4], dim=-1)
    assert imbalance(torch.zeros(4, 4), even) == 0
    skewed = torch.tensor([[9.0, 0, 0, 0]]).expand(4, -1)
    assert imbalance(skewed, torch.zeros(4, 1, dtype=torch.int64)) == pytest.approx(3, abs=0.01)
