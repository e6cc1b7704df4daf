"""The same model, text, seed and machine give the same files, to the byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEXT
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from vllm_milo.offline.cli import main
from vllm_milo.offline.effort import Effort
from vllm_milo.offline.learn import end_to_end, layer
from vllm_milo.offline.learn import repeatable as repeatable_module
from vllm_milo.offline.learn.repeatable import repeatable


def quantize(model: Path, out: Path, hashes: int, *options: str) -> dict[str, bytes]:
    """The files of a checkpoint by a process of its own, whose hashes of strings have another seed each time."""
    command = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", str(model), "-o", str(out), "--quiet"]
    environment = os.environ | {"PYTHONHASHSEED": str(hashes), "TRITON_INTERPRET": "0"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def compare(found: list[dict[str, bytes]]) -> None:
    """Assert that the first two are the same, and further ones are not."""
    first, again, *others = found
    assert {"config.json", "milo_report.json", "model-00001-of-00001.safetensors"} <= first.keys()
    assert first.keys() == again.keys()
    different = [name for name, content in first.items() if again[name] != content]
    assert not different
    for other in others:
        assert first["model-00001-of-00001.safetensors"] != other["model-00001-of-00001.safetensors"]


def test_the_same_bytes_with_learning(small_model: Path, tmp_path: Path):
    """Of more windows than a step takes, so that the seed chooses among them."""
    options = ["--calibration", str(TEXT), "--calibration-windows", "6", "--learn-steps", "4", "--device", "cpu"]
    compare([quantize(small_model, tmp_path / str(number), number, *options) for number in range(2)])


@pytest.mark.parametrize("options", [["--preset", "best"], ["--calibration", "self"]])
def test_the_same_bytes_of_other_ways(small_model: Path, tmp_path: Path, monkeypatch, options: list[str]):
    """Training the whole model after its layers, and the model's own text."""
    monkeypatch.setattr("vllm_milo.offline.calibration.choose.WINDOW", 64)
    monkeypatch.setattr("vllm_milo.offline.effort.CPU_EFFORT", Effort(6, 3, 4))  # of the whole model too
    found = []
    for number, seed in enumerate(["0", "0", "1"]):
        torch.manual_seed(number)  # the state of torch's own generator does not count
        few = ["--calibration-windows", "6", "--learn-steps", "3", "--max-rounds", "1", "--quiet", "--device", "cpu"]
        out = tmp_path / str(number)
        assert main(["quantize", str(small_model), "-o", str(out), *few, *options, "--seed", seed]) == 0
        found.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    compare(found)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["balanced", "best"])
def test_the_same_bytes_on_a_gpu(small_model: Path, tmp_path: Path, preset: str):
    """With captured steps, in windows long enough that fused attention adds up in parts."""
    options = ["--preset", preset, "--calibration-windows", "16", "--learn-steps", "20", "--device", "cuda"]
    runs = [
        quantize(small_model, tmp_path / str(number), number, *options, "--seed", seed)
        for number, seed in enumerate(["0", "0", "1"])
    ]
    compare(runs)


def gradients(wrap: Callable[[], Any], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """The gradients of attention's inputs, causal, 512 tokens, by several calls."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(8, 16, 512, 64, device=device, dtype=dtype, generator=generator) for _ in range(4)]
    found = []
    for _ in range(8):
        q, k, v = (values.clone().requires_grad_(True) for values in inputs[:3])
        with wrap():
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
            found.append(
                torch.cat([part.flatten() for part in torch.autograd.grad((out * inputs[3]).sum(), (q, k, v))])
            )
    return found


@pytest.mark.gpu
def test_attention_is_differentiated_the_same_each_time():
    device = torch.device("cuda")
    first, *others = gradients(lambda: repeatable(device), "cuda", torch.bfloat16)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_repeatable_attention_is_attention(causal: bool, groups: int):
    """Its result and its gradients are those of plain products in float32; keys and values of several heads shared."""
    shape = [(2, 8, 96, 64), *[(2, 8 // groups, 96, 64)] * 2]
    inputs = [torch.randn(each, device="cuda", dtype=torch.bfloat16) for each in shape]
    weight = torch.randn(shape[0], device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (values.to(dtype).requires_grad_(True) for values in inputs)
        with repeatable(torch.device("cuda")):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.2, enable_gqa=groups > 1)
        found.append([out.float(), *(part.float() for part in torch.autograd.grad((out * weight).sum(), (q, k, v)))])
    for mine, right in zip(*found, strict=True):
        assert mine.shape == right.shape
        assert (mine - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("masked", [True, False])
def test_what_flash_attention_cannot_do_is_plain_products(monkeypatch: pytest.MonkeyPatch, masked: bool):
    """A mask, or float32; and only where a GPU trains."""
    chosen: list[Any] = []
    real = repeatable_module.sdpa_kernel
    monkeypatch.setattr(repeatable_module, "sdpa_kernel", lambda backend: chosen.append(backend) or real(backend))
    q, k, v = torch.randn(3, 1, 2, 8, 16).bfloat16() if masked else torch.randn(3, 1, 2, 8, 16)
    mask = torch.ones(8, 8, dtype=torch.bool).tril() if masked else None
    results = []
    for device, expected in (("cuda", [SDPBackend.MATH]), ("cpu", [])):
        with repeatable(torch.device(device)):
            results.append(scaled_dot_product_attention(q, k, v, attn_mask=mask).float())
        assert chosen == expected
        chosen.clear()
    assert torch.allclose(*results, atol=2e-2)


def test_steps_of_both_trainings_are_repeatable(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each step that is differentiated runs inside."""
    monkeypatch.setattr("vllm_milo.offline.calibration.choose.WINDOW", 32)
    inside: list[bool] = []

    class Noting:
        active = False

        def __init__(self, device: torch.device) -> None:
            assert device.type == "cpu"

        def __enter__(self) -> None:
            Noting.active = True

        def __exit__(self, *_: object) -> None:
            Noting.active = False

    for module in (layer, end_to_end):
        monkeypatch.setattr(module, "repeatable", Noting)
        real = module.step_groups
        monkeypatch.setattr(module, "step_groups", lambda *a, real=real: inside.append(Noting.active) or real(*a))
    few = ["--calibration-windows", "4", "--learn-steps", "2", "--max-rounds", "1", "--quiet", "--device", "cpu"]
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), "--preset", "best", *few]) == 0
    assert len(inside) == 2 * 2 + 2 * 16
    assert all(inside)
