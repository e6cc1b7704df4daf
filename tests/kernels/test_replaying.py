"""Launches that are recorded and made again: by plain Python, by Triton up to its launcher, and on the GPU."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import moe_spec, random_experts, random_routing
from scripts import run_script
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_milo.kernels import ops
from vllm_milo.kernels.launch import LaunchMode, launch
from vllm_milo.kernels.replaying import experts, recording
from vllm_milo.kernels.serving import fused_moe as direct

CPU = torch.device("cpu")
MODE = LaunchMode(asm=False, early=False)
HARMLESS = {"empty", "new_empty", "empty_like", "empty_strided", "view", "slice", "split", "split_with_sizes"}
HARMLESS |= {"expand", "reshape", "detach", "alias", "_unsafe_view", "as_strided", "select", "unsqueeze"}


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> dict:
    recordings: dict = {}
    monkeypatch.setattr(recording, "_recordings", recordings)
    return recordings


class Compiled:
    """A compiled kernel of Triton's, as far as a recording knows it."""

    packed_metadata = ()

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert len(grid) == 3
        return partial(self._run, grid)


def floats(address: int, number: int) -> Any:
    """Numbers at an address, which a launch of a recording gets."""
    return (ctypes.c_float * number).from_address(address)


class Sum:
    """target = first + (second or 0) + n: a kernel on floats, which counts how it was launched."""

    arg_names = ("sources", "target", "number", "more", "CONSTANT")

    def __init__(self) -> None:
        self.launched = self.replayed = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(sources: Any, target: torch.Tensor, number: int, more: int, CONSTANT: str) -> Compiled:
            assert CONSTANT == "constant"
            self.launched += 1
            first, second = sources
            target.copy_(first + (0 if second is None else second) + more)
            return Compiled(self.again)

        return run

    def again(self, grid: tuple[int, ...], sources: Any, target: int, number: int, more: int, constant: None) -> None:
        self.replayed += 1
        first, second = sources
        given, added, found = floats(first, number), second and floats(second, number), floats(target, number)
        for index in range(number):
            found[index] = given[index] + (added[index] if added else 0.0) + more


def add_up(kernel: Sum, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """2·x + y + 5 by three launches, whose intermediates are parts of one tensor and a tensor."""
    number = x.numel()
    both = torch.empty(2 * number)
    between = torch.empty_like(x)
    out = torch.empty_like(x)
    launch(kernel, (1,), MODE, (x, None), both[number:], number, 2, CONSTANT="constant")
    launch(kernel, (1, 2), MODE, (x, y), between, number, 3, CONSTANT="constant")
    launch(kernel, (1, 2, 3), MODE, (both[number:], between), out, number, 0, CONSTANT="constant")
    return out


def sums(kernel: Sum, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return recording.replayed(partial(add_up, kernel, x, y), "sums", (x, y, None), CPU)


def test_other_tensors_are_taken_through_the_same_launches():
    kernel = Sum()
    for call in range(4):
        x, y = torch.randn(2, 33)
        x, y = x.clone(), y.clone()
        torch.testing.assert_close(sums(kernel, x, y), 2 * x + y + 5)
        assert (kernel.launched, kernel.replayed) == (3, 3 * call)


def test_other_alignments_are_recorded_anew(nothing_recorded: dict):
    kernel = Sum()
    memory, y = torch.randn(64), torch.randn(16)
    for x in (memory[:16], memory[16:32], memory[1:17], memory[33:49]):
        torch.testing.assert_close(sums(kernel, x, y), 2 * x + y + 5)
    assert (kernel.launched, kernel.replayed, len(nothing_recorded)) == (6, 6, 2)


def part_of_an_input(kernel: Sum, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(y)
    launch(kernel, (1,), MODE, (x[16:], y), out, 16, 0, CONSTANT="constant")
    return out


def sum_by_torch(kernel: Sum, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return part_of_an_input(kernel, x.clone(), y) + 1


def test_inputs_at_the_same_place_are_not_told_apart():
    kernel = Sum()
    for x, y in ((torch.ones(32),) * 2, torch.randn(2, 32)):
        found = recording.replayed(partial(add_up, kernel, x, y), "alike", (x, y), CPU)
        torch.testing.assert_close(found, 2 * x + y + 5)
    assert kernel.replayed == 0


@pytest.mark.parametrize("call", [part_of_an_input, sum_by_torch])
def test_what_launches_do_not_tell_is_called(call: Callable[..., torch.Tensor]):
    kernel = Sum()
    for again in range(3):
        x, y = torch.randn(32), torch.randn(16)
        found = recording.replayed(partial(call, kernel, x, y), call, (x, y), CPU)
        torch.testing.assert_close(found, x[16:] + y + (call is sum_by_torch))
        assert (kernel.launched, kernel.replayed) == (again + 1, 0)


def test_the_oldest_recording_goes(monkeypatch: pytest.MonkeyPatch, nothing_recorded: dict):
    monkeypatch.setattr(recording, "MOST", 2)
    kernel, x, y = Sum(), torch.randn(8), torch.randn(8)
    for key in "abcb":
        recording.replayed(partial(add_up, kernel, x, y), key, (x, y), CPU)
    assert [key[0] for key in nothing_recorded] == ["b", "c"]
    assert (kernel.launched, kernel.replayed) == (9, 3)


RANKS = (48, 33, 16, 0)


class Layer:
    """Random experts whose ranks differ from layer to layer, but for the largest of all."""

    def __init__(self, number: int, device: str, experts: int = 4) -> None:
        torch.manual_seed(number)
        ranks13 = [[RANKS[(expert + number) % 4], RANKS[expert * number % 4]] for expert in range(experts)]
        ranks2 = [[RANKS[(expert + number) % 4]] for expert in range(experts)]
        self.spec = moe_spec(ranks13, ranks2, 3)
        sources = random_experts(ranks13, 256, 256, 64, 3), random_experts(ranks2, 256, 128, 64, 3)
        moved = [type(one)(*(None if t is None else t.to(device) for t in one)) for one in sources]
        self.weights = [ops.prepare_experts(one, self.spec, "triton") for one in moved]

    def inputs(self, tokens: int, dtype: torch.dtype, device: str, local: list[int] | None = None) -> list[Any]:
        x = torch.randn(tokens, 256).to(dtype).to(device)
        weights, ids = random_routing(tokens, 2, 4 if local is None else len(local))
        expert_map = None if local is None else torch.tensor(local, dtype=torch.int32, device=device)
        return [x, weights.to(device), ids.to(device), expert_map, *self.weights, self.spec]


class Log:
    """Kernels of a layer that do not run, and what was launched: their names, grids and arguments."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, ...], list[Any]]] = []
        self.kept: list[Any] = []

    def kernel(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        name = kernel.fn.__name__

        def run(*arguments: Any, **constants: Any) -> Compiled:
            self.kept.append(arguments)
            runtime = [*arguments, *[None] * (len(kernel.arg_names) - len(arguments))]
            self.note(name, (*grid, 1, 1)[:3], *runtime)
            return Compiled(partial(self.note, name))

        return run

    def note(self, name: str, grid: tuple[int, ...], *arguments: Any) -> None:
        flat = [one.data_ptr() if torch.is_tensor(one) else one for one in leaves(arguments)]
        self.launches.append((name, grid, flat))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from leaves(one)
    else:
        yield value


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What kernels are launched with, which are not run."""
    log = Log()
    kind = type(direct.prepare.__globals__["_prepare_kernel"])
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: log.kernel(kernel, grid))
    return log


def same_but_for_intermediates(first: Log, again: Log, inputs: list[Any]) -> None:
    """Compare launches: names, grids, constants and inputs are the same, and intermediates lie apart."""
    known = {0, *(one.data_ptr() for one in leaves(inputs) if torch.is_tensor(one))}
    place: dict[int, int] = {}
    for (name, grid, arguments), (other, other_grid, others) in zip(first.launches, again.launches, strict=True):
        assert (name, grid, len(arguments)) == (other, other_grid, len(others))
        for one, two in zip(arguments, others, strict=True):
            if one is None or one in known or one < 2**32:  # sizes are small numbers, and addresses large ones
                assert one == two
            else:
                assert place.setdefault(one, two) == two
                assert two % 16 == one % 16
    assert len(set(place.values())) == len(place)
    ends = {one.data_ptr(): one.data_ptr() + one.nbytes for one in leaves(first.kept) if torch.is_tensor(one)}
    starts = sorted((two, ends[one] - one) for one, two in place.items())
    for (start, size), (after, _) in pairwise(starts):
        assert start + size <= after


@pytest.mark.parametrize("local", [None, [2, -1, 0, 1, -1, 3]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_layers_launch_what_they_would(
    tokens: int, dtype: torch.dtype, local: list[int] | None, log: Log, nothing_recorded: dict
):
    first, second = Layer(0, "cpu"), Layer(1, "cpu")
    experts.fused_moe(*first.inputs(tokens, dtype, "cpu", local))
    assert None not in nothing_recorded.values()
    inputs = second.inputs(tokens, dtype, "cpu", local)
    again, log.launches, log.kept = Log(), [], []
    direct.fused_moe(*inputs)
    again.launches, log.launches = log.launches, []
    again.kept = log.kept
    out = experts.fused_moe(*inputs)
    assert out.shape == (tokens, 256)
    assert out.dtype == dtype
    assert len(nothing_recorded) == 1
    assert len(log.launches) in (6, 7)
    same_but_for_intermediates(again, log, inputs)


def test_triton_is_handed_the_same(tmp_path: Path):
    """With Triton as on a GPU, down to what its launcher takes."""
    found = json.loads(run_script("replay_launches.py", cache=tmp_path))
    assert [row["recorded"] for row in found.values()] == [1, 2]
    for row in found.values():
        assert len(row["direct"]) in (6, 7)
        assert row["replayed"] == row["direct"]
        assert all("own" in arguments for _, _, arguments in row["direct"])


def test_sizes_and_types_have_recordings_of_their_own(log: Log, nothing_recorded: dict):
    layer, wider = Layer(0, "cpu"), Layer(0, "cpu", experts=6)
    for made, tokens, dtype in (
        (layer, 5, torch.float16),
        (layer, 6, torch.float16),
        (layer, 5, torch.bfloat16),
        (wider, 5, torch.float16),
    ):
        experts.fused_moe(*made.inputs(tokens, dtype, "cpu"))
    local = [2, -1, 0, 1, -1, 3]
    for kind in (torch.int32, torch.int64):
        inputs = layer.inputs(5, torch.float16, "cpu", local)
        inputs[3] = inputs[3].to(kind)
        experts.fused_moe(*inputs)
    inputs = layer.inputs(5, torch.float16, "cpu")
    inputs[-1] = inputs[-1]._replace(max_ranks=[160, 48])
    experts.fused_moe(*inputs)
    assert len(nothing_recorded) == 7


@pytest.mark.parametrize("wanted", [False, True])
def test_the_variable_forbids_replays(wanted: bool, log: Log, nothing_recorded: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(recording.VARIABLE, raising=False)
    if not wanted:
        monkeypatch.setenv(recording.VARIABLE, "0")
    recording.is_wanted.cache_clear()
    ops.fused_moe(*Layer(0, "cpu").inputs(5, torch.float16, "cpu"), "triton")
    recording.is_wanted.cache_clear()
    assert len(nothing_recorded) == wanted


class Operations(TorchDispatchMode):
    """Notes what torch itself does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_a_recorded_layer_computes_nothing_by_torch(tokens: int, log: Log):
    inputs = Layer(0, "cpu").inputs(tokens, torch.bfloat16, "cpu")
    with Operations() as operations:
        direct.fused_moe(*inputs)
    assert operations.names <= HARMLESS


def test_what_torch_computes_is_not_recorded(log: Log, nothing_recorded: dict):
    layer = Layer(0, "cpu")
    x, weights, ids, *rest = layer.inputs(6, torch.float16, "cpu")
    experts.fused_moe(x[::2], weights[::2], ids[::2], *rest)
    experts.fused_moe(x, weights, ids, *rest[:-1], layer.spec._replace(router_weight_on_input=True))
    assert nothing_recorded == {}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_layers_that_choose_launch_what_they_would(tokens: int, padded: bool, log: Log, nothing_recorded: dict):
    def inputs(layer: Layer) -> list[Any]:
        padding = torch.zeros(tokens, dtype=torch.bool) if padded else None
        x, logits = torch.randn(tokens, 256).bfloat16(), torch.randn(tokens, 4)
        return [x, logits, padding, 2, True, None, *layer.weights, layer.spec]

    first, second = Layer(0, "cpu"), Layer(1, "cpu")
    experts.routed_moe(*inputs(first))
    assert None not in nothing_recorded.values()
    given = inputs(second)
    again, log.launches, log.kept = Log(), [], []
    direct.routed_moe(*given)
    again.launches, log.launches = log.launches, []
    again.kept = log.kept
    assert experts.routed_moe(*given).shape == (tokens, 256)
    assert len(nothing_recorded) == 1
    assert ("_choose_kernel" in {name for name, *_ in log.launches}) == (tokens > 16)
    same_but_for_intermediates(again, log, given)
    experts.routed_moe(*given[:4], False, *given[5:])
    assert len(nothing_recorded) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 64, 300, 3000])
def test_layers_give_what_they_would(tokens: int, nothing_recorded: dict):
    """Bit for bit, whatever has been computed in between in the same memory."""
    layers = [Layer(number, "cuda") for number in range(3)]
    for turn in range(2):
        for layer in layers:
            inputs = layer.inputs(tokens, torch.bfloat16, "cuda")
            expected = direct.fused_moe(*inputs)
            torch.empty(64 << 20, dtype=torch.uint8, device="cuda").fill_(0xFF)
            assert torch.equal(experts.fused_moe(*inputs), expected), turn
    assert len(nothing_recorded) == 1
    assert None not in nothing_recorded.values()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_layers_that_choose_give_what_they_would(tokens: int, nothing_recorded: dict):
    for layer in [Layer(number, "cuda") for number in range(3)]:
        x, logits = torch.randn(tokens, 256).bfloat16().cuda(), torch.randn(tokens, 4).cuda()
        padding = torch.rand(tokens).cuda() < 0.3
        given = [x, logits, padding, 2, True, None, *layer.weights, layer.spec]
        expected = direct.routed_moe(*given)
        torch.empty(64 << 20, dtype=torch.uint8, device="cuda").fill_(0xFF)
        assert torch.equal(experts.routed_moe(*given), expected)
    assert len(nothing_recorded) == 1


@pytest.mark.gpu
def test_a_graph_of_replayed_launches_follows_its_inputs():
    layers = [Layer(number, "cuda") for number in range(2)]
    first, second = (layer.inputs(20, torch.bfloat16, "cuda") for layer in layers)
    experts.fused_moe(*first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts.fused_moe(*second)
    fresh = layers[1].inputs(20, torch.bfloat16, "cuda")
    for place in range(3):
        second[place].copy_(fresh[place])
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, direct.fused_moe(*fresh))
