"""What is timed: random experts, in the interpreter and on a GPU, checked against the reference."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from vllm_milo.kernels.compiling.jobs import Job
from vllm_milo.kernels.launch import Pointer
from vllm_milo.kernels.serving.gemm.heuristic import heuristic_configs
from vllm_milo.kernels.tuned import make_key, read_file, write_file
from vllm_milo.kernels.tuning import candidates, layer, timing
from vllm_milo.kernels.tuning.compiling import compile_jobs, processes
from vllm_milo.kernels.tuning.layer import Layer, Point, WrongResultError
from vllm_milo.kernels.tuning.timing import BadOutputError, Budget
from vllm_milo.kernels.tuning.tune import chosen, tune
from vllm_milo.kernels.weights import MoEShape

CPU = torch.device("cpu")
SHAPE = MoEShape(2, 1, 64, 64, (64, 64), (32, 16))


@pytest.fixture
def _few_calls(monkeypatch: pytest.MonkeyPatch):
    """The interpreter takes a second for a call."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is chosen per process; this one has a GPU")
    monkeypatch.setattr(layer, "CALLS_IN_GRAPH", 1)
    monkeypatch.setattr(timing, "MIN_REPLAYS", 1)


@pytest.fixture
def point(_few_calls: None) -> Point:
    return Point(Layer(SHAPE, CPU, torch.float16), 2, 0.0)


def test_a_right_result_is_timed(point: Point):
    assert point.microseconds(heuristic_configs(2, SHAPE, CPU)) > 0


@pytest.mark.parametrize("ranks", [(0, 0), (16, 16), (64, 0)])
def test_the_layer_has_the_ranks_of_its_shape(ranks: tuple[int, int]):
    spec = Layer(SHAPE._replace(ranks=ranks), CPU, torch.float16).spec
    assert spec.max_ranks == [max(32, ranks[0]) if ranks[0] else 0, ranks[1]]


def test_a_wrong_result_is_no_time(point: Point, monkeypatch: pytest.MonkeyPatch):
    tiles, right = heuristic_configs(2, SHAPE, CPU), layer.fused_moe
    monkeypatch.setattr(layer, "fused_moe", lambda *arguments: right(*arguments) * 1.05)
    with pytest.raises(WrongResultError, match=r"relative error 0\.0\d+ against float32, above 0\.02"):
        point.microseconds(tiles)
    monkeypatch.setattr(layer, "fused_moe", lambda *arguments: right(*arguments) * float("nan"))
    with pytest.raises(BadOutputError, match="not finite"):
        point.microseconds(tiles)


def test_calls_differ_in_input_and_rotate_over_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layer, "l2_bytes", lambda device: 2**30)
    copied = Layer(SHAPE, CPU, torch.float16)
    calls = copied.calls(copied.inputs(2), heuristic_configs(2, SHAPE, CPU))
    assert len({call.args[0].data_ptr() for call in calls}) == len(calls) == 8
    assert len({call.args[4][0].data_ptr() for call in calls}) == 8, "weights of other copies"
    monkeypatch.setattr(layer, "l2_bytes", lambda device: 0)
    assert len(Layer(SHAPE, CPU, torch.float16).copies) == 1


def test_tokens_of_every_second_call_prefer_some_experts():
    shape = MoEShape(8, 2, 64, 64, (64, 64), (0, 0))
    counts = [ids.flatten().bincount(minlength=8) for ids in Layer(shape, CPU, torch.float16).inputs(256).ids]
    assert all(int(each.sum()) == 512 for each in counts)
    spreads = [float(each.double().std()) for each in counts]
    assert min(spreads[1::2]) > max(spreads[::2])


@pytest.mark.usefixtures("_few_calls")
def test_a_tune_in_the_interpreter_times_the_heuristic_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "TILES", candidates.TILES[:2])
    monkeypatch.setattr(candidates, "SPLITS", (1,))
    said: list[str] = []
    results = tune(SHAPE, CPU, 0.01, torch.float16, (1, 2), said.append)
    assert [rows[0].tiles for rows in results.values()] == [heuristic_configs(n, SHAPE, CPU) for n in (1, 2)]
    assert all(rows[0].error is None for rows in results.values())
    assert [text.split(":")[0] for text in said] == ["1 tokens", "2 tokens"]


def test_processes_compile_without_a_gpu_and_what_fails_does_not_count(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = [Pointer(torch.float32, 0), Pointer(torch.bfloat16, 0), 4096]
    constants = {"SPLIT_K": 2, "BLOCK": 512, "PDL": False, "num_warps": 4}
    good = Job("vllm_milo.kernels.serving.reduce", "_sum_splits_kernel", arguments, constants)
    wrong = good._replace(constants=constants | {"BLOCK": 500})  # no power of two
    assert compile_jobs([good, wrong], 90, 1, Budget(300)) == 1
    assert list(tmp_path.rglob("_sum_splits_kernel.cubin"))
    assert not multiprocessing.active_children()
    assert processes() >= 1


@pytest.mark.gpu
def test_a_small_tune_from_start_to_file(tmp_path: Path):
    shape, device = MoEShape(8, 2, 512, 512, (128, 128), (32, 16)), torch.device("cuda", 0)
    results = tune(shape, device, 60.0, torch.bfloat16, (1, 64, 1024))
    for rows in results.values():
        assert rows[0].microseconds is not None, rows[0].error
        assert sum(row.microseconds is not None for row in rows) >= 2, [row.error for row in rows]
        assert not any("WrongResultError" in (row.error or "") for row in rows), [row.error for row in rows]
    path = tmp_path / make_key(shape, torch.cuda.get_device_name(0), torch.bfloat16).file_name
    write_file(path, chosen(results, shape, device), "3.6.0")
    assert list(read_file(path)) == [1, 64, 1024]
