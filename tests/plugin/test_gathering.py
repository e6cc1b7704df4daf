"""Matrices of a model that is quantized while it is loaded are quantized together, as the converter does it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.offline.batches import gather_layers
from vllm_milo.offline.checkpoint.matrices import store_matrices
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Kind, Matrix, Moments, Recipe
from vllm_milo.offline.presets import milo_recipe
from vllm_milo.offline.spread import job
from vllm_milo.online import gathering, pinned
from vllm_milo.online.gathering import Gathering

CPU = torch.device("cpu")
SHAPES = {"self_attn.q_proj": (64, 128), "mlp.experts.0.up_proj": (64, 128), "mlp.experts.0.down_proj": (128, 64)}
RANKS = {"self_attn.q_proj": 16, "mlp.experts.0.up_proj": 8, "mlp.experts.0.down_proj": 0}
LAYERS = (0, 2, 10)


def recipe() -> Recipe:
    return milo_recipe(False, group_size=64, max_rounds=1)


def model() -> dict[str, torch.Tensor]:
    """Return matrices of three layers by tensor name, in the order of files that sort numbers as text."""
    generator = torch.Generator().manual_seed(0)
    named = [(f"model.layers.{layer}.{name}.weight", shape) for layer in LAYERS for name, shape in SHAPES.items()]
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in sorted(named)}


def rank_of(name: str) -> int:
    return RANKS[name.removesuffix(".weight").split(".", 3)[3]]


def announced(weights: dict[str, torch.Tensor]) -> Gathering:
    found = Gathering(recipe())
    for name, values in weights.items():
        found.expect(name, rank_of(name), values.numel())
    return found


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the solver gets, as it gets it."""
    seen: list[tuple[int, ...]] = []
    original = job.quantize_matrices

    def quantize(weights: torch.Tensor, *arguments: Any) -> Any:
        seen.append(tuple(weights.shape))
        return original(weights, *arguments)

    monkeypatch.setattr(job, "quantize_matrices", quantize)
    return seen


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gather layers on the CPU too."""

    def gathered(layers: Iterable[Any], device: torch.device, elements: int) -> Iterator[list[Any]]:
        return gather_layers(layers, torch.device("cuda"), elements)

    monkeypatch.setattr(gathering, "gather_layers", gathered)


def load(into: Gathering, weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Hand over all matrices, and return what came of each."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, values in weights.items():
        into.take(name, values, CPU, lambda tensors, name=name: found.__setitem__(name, dict(tensors)))
    return found


def alone(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a matrix becomes by itself."""
    one = job.Job(
        [Matrix("m", Kind.ATTENTION, *values.shape)], values[None], Moments(), [rank_of(name)], recipe(), values.dtype
    )
    [(_, stored)] = store_matrices(job.solve(one, CPU).solved)
    return {tensor.removeprefix("m."): found for tensor, found in stored.tensors.items()}


def assert_each_is_its_own(found: dict[str, dict[str, torch.Tensor]], weights: dict[str, torch.Tensor]) -> None:
    assert found.keys() == weights.keys()
    for name, tensors in found.items():
        expected = alone(name, weights[name])
        assert tensors.keys() == expected.keys()
        for leaf, tensor in tensors.items():
            assert torch.equal(tensor, expected[leaf]), f"{name} {leaf}"


def test_a_gpu_gets_all_layers_that_fill_a_batch_at_once(
    batches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(gathering, "solver_weights", lambda devices, limit: 2**20)
    weights = model()
    into = announced(weights)
    found = load(into, weights)
    assert sorted(batches) == [(3, 128, 64), (6, 64, 128)]
    assert_each_is_its_own(found, weights)
    into.refuse_incomplete()


def test_what_a_batch_cannot_hold_is_no_step(batches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch):
    """With room for two layers the third is a step of its own."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(gathering, "solver_weights", lambda devices, limit: 2 * 3 * 64 * 128)
    load(announced(model()), model())
    assert sorted(batches) == [(1, 128, 64), (2, 64, 128), (2, 128, 64), (4, 64, 128)]


def test_a_cpu_gets_a_layer_at_a_time(batches: list[tuple[int, ...]]):
    weights = model()
    found = load(announced(weights), weights)
    assert sorted(batches) == [(1, 128, 64)] * 3 + [(2, 64, 128)] * 3
    assert_each_is_its_own(found, weights)


def test_weights_are_let_go_when_their_layer_is_done():
    weights, into, held = model(), announced(model()), []
    for name, values in weights.items():
        into.take(name, values, CPU, lambda tensors: None)
        held.append(sum(len(step.taken) for step in {id(step): step for step in into._steps.values()}.values()))
    assert held == [1, 2, 0] * 3


def test_layers_that_are_made_later_are_steps_of_their_own(batches: list[tuple[int, ...]]):
    """A model that drafts for another is made once the first is loaded."""
    weights = model()
    first = {name: values for name, values in weights.items() if ".layers.0." in name}
    later = {name: values for name, values in weights.items() if name not in first}
    into = announced(first)
    found = load(into, first)
    for name, values in later.items():
        into.expect(name, rank_of(name), values.numel())
    assert_each_is_its_own(found | load(into, later), weights)


def test_files_that_lack_a_matrix_are_refused(batches: list[tuple[int, ...]]):
    weights = model()
    into = announced(weights)
    for name in ("model.layers.2.self_attn.q_proj.weight", "model.layers.10.self_attn.q_proj.weight"):
        del weights[name]
    load(into, weights)
    said = r"model\.layers\.2\.self_attn\.q_proj\.weight and 1 more never arrived; are the model's files complete\?"
    with pytest.raises(CheckpointError, match=said):
        into.refuse_incomplete()
    assert len(batches) == 2  # nothing was computed for layers that are not complete


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.7.self_attn.q_proj.weight"])
def test_what_comes_twice_or_unasked_is_refused(name: str):
    weights = model()
    into = announced(weights)
    into.take("model.layers.0.self_attn.q_proj.weight", torch.ones(64, 128), CPU, lambda tensors: None)
    with pytest.raises(CheckpointError, match=rf"{name}: appears twice, or in no layer of the model"):
        into.take(name, torch.ones(64, 128), CPU, lambda tensors: None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_too_little_memory_is_said(error: BaseException, monkeypatch: pytest.MonkeyPatch):
    """With what was quantized, and what to do; other errors stay what they are."""
    weights, raised = model(), [error, RuntimeError("another")]

    def fail(*_: Any) -> None:
        raise raised[0]

    monkeypatch.setattr(job, "quantize_matrices", fail)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight: out of memory on cpu"
    ):
        load(announced(weights), weights)
    raised.pop(0)
    with pytest.raises(RuntimeError, match="another"):
        load(announced(weights), weights)


def test_the_next_batch_is_solved_while_results_are_delivered(monkeypatch: pytest.MonkeyPatch):
    """Of the layer's two batches the second one begins while the first one's results are taken."""
    begun: list[threading.Event] = [threading.Event(), threading.Event()]
    original, weights = job.quantize_matrices, {name: values for name, values in model().items() if ".2." in name}
    number = itertools.count()

    def quantize(*arguments: Any) -> Any:
        begun[next(number)].set()
        return original(*arguments)

    monkeypatch.setattr(job, "quantize_matrices", quantize)
    into, overlapped = announced(weights), []
    for name, values in weights.items():
        into.take(name, values, CPU, lambda tensors: overlapped.append(begun[1].wait(20)))
    assert len(overlapped) == 3
    assert overlapped[0]


def test_an_error_of_the_solver_is_the_callers(monkeypatch: pytest.MonkeyPatch):
    weights = {name: values for name, values in model().items() if ".2." in name}
    broken = next(name for name in weights if "down_proj" in name)
    weights[broken] = weights[broken].clone().fill_(float("nan"))
    before = threading.active_count()
    with pytest.raises(ConversionError, match="down_proj"):
        load(announced(weights), weights)
    assert threading.active_count() == before


@pytest.mark.parametrize("names", [(), ("_host_emptyCache",)])
def test_memory_is_pinned_only_where_it_can_be_given_back(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    given: list[None] = []
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    for name in names:
        monkeypatch.setattr(torch._C, name, lambda: given.append(None), raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert pinned.pins(torch.device("cuda:1")) == bool(names)
    assert not pinned.pins(CPU)
    pinned.release()
    assert len(given) == len(names)
