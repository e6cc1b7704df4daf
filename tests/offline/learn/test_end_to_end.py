"""Training a whole model's quantized state on the original's predictions."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.learn.end_to_end import TuneOptions, tune
from vllm_milo.offline.learn.latents import Rates
from vllm_milo.offline.learn.repeat import Repeat
from vllm_milo.offline.nouns import Matrix, Recipe
from vllm_milo.offline.solve.methods import Solved, quantize_matrices
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import place_tensor, use_grouped_experts

RATES = Rates(codes=0.0, scale=1e-3, zero=5e-3, factors=4e-3)


@pytest.fixture(scope="module")
def reader(bundled_model: Path) -> ModelReader:
    return ModelReader(bundled_model)


@pytest.fixture(scope="module")
def solved(reader: ModelReader) -> dict[Matrix, Solved]:
    shapes: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
    for matrix in reader.matrices:
        shapes[matrix.n, matrix.k].append(matrix)
    found = {}
    for matrices in shapes.values():
        weights = torch.stack([reader.load_finite(f"{matrix.name}.weight").float() for matrix in matrices])
        result = quantize_matrices(weights, 8, Recipe(max_rounds=1), torch.bfloat16)
        found |= {matrix: result.one(place, 8) for place, matrix in enumerate(matrices)}
    return {matrix: found[matrix] for matrix in reader.matrices}


@pytest.fixture
def windows(trained_tokens: torch.Tensor) -> torch.Tensor:
    return trained_tokens[: 4 * 48].view(4, 48)


def run(
    reader: ModelReader, original: Any, solved: dict[Matrix, Solved], windows: torch.Tensor, options: TuneOptions
) -> tuple[dict[Matrix, Solved], Any]:
    model = load_model(reader.folder).requires_grad_(False)
    use_grouped_experts(model)
    place = partial(place_tensor, reader.family)
    return tune(model, original, place, reader.family, solved, windows, 3, options)


@torch.no_grad()
def divergence(reader: ModelReader, original: Any, solved: dict[Matrix, Solved], windows: torch.Tensor) -> float:
    model = load_model(reader.folder)
    held = {reader.family.checkpoint_name(name): p.data for name, p in model.named_parameters()}
    for matrix, one in solved.items():
        place_tensor(reader.family, f"{matrix.name}.weight", held)[1].copy_(one.dequantize())
    wanted, found = (m(windows).logits.double().log_softmax(-1) for m in (original, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_tuning_lowers_the_divergence(reader: ModelReader, solved, windows: torch.Tensor, trained_model):
    """Of what is stored, on the windows themselves; the original stays."""
    kept = {name: parameter.clone() for name, parameter in trained_model.named_parameters()}
    tuned, report = run(reader, trained_model, solved, windows, TuneOptions(steps=12, batch=4, rates=RATES))
    assert all(torch.equal(parameter, kept[name]) for name, parameter in trained_model.named_parameters())
    assert tuned.keys() == solved.keys()
    before, after = (divergence(reader, trained_model, one, windows) for one in (solved, tuned))
    assert report.first == pytest.approx(before, rel=1e-2)
    assert report.last < 0.9 * report.first
    assert after < 0.9 * before
    assert all(torch.equal(one.base.codes, solved[matrix].base.codes) for matrix, one in tuned.items())  # rate 0
    assert any(not torch.equal(one.base.scale, solved[matrix].base.scale) for matrix, one in tuned.items())


def test_the_seed_decides_which_windows(reader: ModelReader, solved, windows: torch.Tensor, trained_model):
    found = []
    for seed in (0, 0, 1):
        options = TuneOptions(steps=2, batch=1, seed=seed, rates=Rates(zero=0.5))
        tuned, _ = run(reader, trained_model, solved, windows, options)
        found.append(torch.cat([one.base.zero.flatten() for one in tuned.values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_on_a_cpu_a_step_is_just_called():
    calls: list[int] = []
    step = Repeat(lambda: calls.append(len(calls)), torch.device("cpu"))
    for _ in range(6):
        step()
    assert calls == list(range(6))


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_captured():
    held, calls = torch.zeros((), device="cuda"), []

    def body() -> None:
        calls.append(1)
        held.add_(1)

    step = Repeat(body, torch.device("cuda"))
    for _ in range(8):
        step()
    assert int(held) == 8
    assert len(calls) == 4  # three to warm up, one that is captured


@pytest.mark.gpu
def test_a_step_that_waits_for_the_host_still_runs():
    held = torch.zeros((), device="cuda")

    def body() -> None:
        held.add_(1)
        held.item()

    stream = torch.cuda.current_stream()
    step = Repeat(body, torch.device("cuda"))
    for _ in range(8):
        step()
    assert int(held) == 8
    assert torch.cuda.current_stream() == stream
    torch.randn(4, device="cuda")  # which random numbers refuse while a graph is captured
