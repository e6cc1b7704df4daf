"""The search with a made-up clock: it finds the best tiles, and passes over what is wrong or fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm_milo.kernels.serving.gemm import heuristic
from vllm_milo.kernels.tuned import Tiles
from vllm_milo.kernels.tuning import candidates
from vllm_milo.kernels.tuning.candidates import all_candidates, first_candidates
from vllm_milo.kernels.tuning.layer import WrongResultError
from vllm_milo.kernels.tuning.search import Result, best, search
from vllm_milo.kernels.tuning.timing import Budget
from vllm_milo.kernels.tuning.tune import chosen, line
from vllm_milo.kernels.weights import MoEShape

CPU = torch.device("cpu")
SHAPE = MoEShape(64, 6, 2048, 1408, (128, 64), (128, 64))
TOKENS = 256


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch):
    for module in (heuristic, candidates):
        monkeypatch.setattr(module, "processors", lambda device: 132)


def clock(target: Tiles) -> Callable[[Tiles], float]:
    """Return a time that falls with each field that agrees with ``target``, the first GEMM's before the second's."""

    def microseconds(tiles: Tiles) -> float:
        differ = [
            weight * sum(own != its for own, its in zip(one, two, strict=True))
            for weight, one, two in zip((100, 10), tiles, target, strict=True)
        ]
        return 50.0 + sum(differ)

    return microseconds


def test_the_best_tiles_are_found():
    for target in all_candidates(TOKENS, SHAPE, CPU)[-1], first_candidates(TOKENS, SHAPE, CPU)[3]:
        results = search(TOKENS, SHAPE, CPU, clock(target), Budget(60))
        winner = best(results)
        assert winner is not None
        assert winner.tiles == target
        assert winner.microseconds == 50.0
        assert results[0].tiles == heuristic.heuristic_configs(TOKENS * 6, SHAPE, CPU)
        assert len({result.tiles for result in results}) == len(results), "none is timed twice"


def test_a_wrong_result_loses_however_fast_it_is():
    firsts = first_candidates(TOKENS, SHAPE, CPU)
    wrong, failing, good = firsts[1], firsts[2], firsts[4]
    rest = clock(good)

    def microseconds(tiles: Tiles) -> float:
        if tiles == wrong:
            raise WrongResultError("relative error 0.3 against float32")
        if tiles == failing:
            raise RuntimeError("out of resource: shared memory")
        return rest(tiles)

    results = search(TOKENS, SHAPE, CPU, microseconds, Budget(60))
    errors = {result.tiles: result.error for result in results if result.error}
    assert errors == {
        wrong: "WrongResultError: relative error 0.3 against float32",
        failing: "RuntimeError: out of resource: shared memory",
    }
    winner = best(results)
    assert winner is not None
    assert winner.tiles == good
    assert f"{len(results)} candidates, 2 failed: 50.0 us" in line(TOKENS, results)


def test_without_time_the_heuristic_alone_is_timed():
    results = search(TOKENS, SHAPE, CPU, lambda tiles: 3.0, Budget(-1))
    assert [result.microseconds for result in results] == [3.0]


def test_differences_of_measurement_change_nothing():
    tiles = first_candidates(TOKENS, SHAPE, CPU)[:2]
    near, far = ([Result(tiles[0], 100.0, None), Result(tiles[1], other, None)] for other in (99.5, 98.0))
    assert best(near) == near[0]
    assert best(far) == far[1]


def test_where_all_is_wrong_the_heuristic_is_chosen():
    def microseconds(tiles: Tiles) -> float:
        raise WrongResultError("wrong")

    results = {TOKENS: search(TOKENS, SHAPE, CPU, microseconds, Budget(60))}
    assert best(results[TOKENS]) is None
    assert chosen(results, SHAPE, CPU) == {TOKENS: heuristic.heuristic_configs(TOKENS * 6, SHAPE, CPU)}
    assert line(TOKENS, results[TOKENS]).endswith("WrongResultError: wrong")
