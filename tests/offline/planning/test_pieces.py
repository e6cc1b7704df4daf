"""How much of a model is solved at once, by the memory that there is."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.offline.batches import Rule, plan_batches
from vllm_milo.offline.calibration import memory
from vllm_milo.offline.calibration.layer_moments import NoMoments
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Kind, Matrix, Moments, Recipe
from vllm_milo.offline.planning.devices import find_devices
from vllm_milo.offline.planning.pieces import refuse_large_matrices, solver_weights
from vllm_milo.offline.spread.devices import Devices
from vllm_milo.offline.spread.job import Job

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SECOND = torch.device("cuda", 1)
EXPERTS = [Matrix(f"experts.{index}.up_proj", Kind.ROUTED_EXPERT, 1024, 2048) for index in range(20)]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that are free on each device."""
    found = {"cpu": 2**40, "cuda:0": 80 * 2**30, "cuda:1": 80 * 2**30}
    monkeypatch.setattr(memory, "available", found.__getitem__)
    return found


def test_memory_halves_what_is_solved_at_once(free: dict[str, int]):
    assert solver_weights([GPU], None) == 2**28
    for size, expected in ((13, 2**28), (11, 2**27), (6, 2**27), (5, 2**26), (1, 2**24)):
        assert solver_weights([GPU], size * 2**30) == expected
        assert memory.solver_need(expected) <= size * 2**30
    free["cuda:1"] = 11 * 2**30
    assert solver_weights([GPU], None) == 2**28
    assert solver_weights([GPU, SECOND], None) == 2**27  # the same on both, whichever has less
    assert solver_weights([GPU, SECOND], 5 * 2**30) == 2**26
    assert solver_weights([CPU], None) == 2**18
    assert solver_weights([CPU], 2**20) == 2**14


def test_a_matrix_that_does_not_fit_by_itself_is_named(free: dict[str, int]):
    large = Matrix("model.layers.7.mlp.gate_proj", Kind.DENSE_FFN, 8192, 32768)
    need = memory.solver_need(large.n * large.k)
    for limit in (None, 40 * 2**30, need):
        refuse_large_matrices([*EXPERTS, large], [GPU, SECOND], limit)
    with pytest.raises(
        ConversionError, match=r"^model\.layers\.7\.mlp\.gate_proj: .*\[8192, 32768\].* 12\.00 GiB"
    ) as e:
        refuse_large_matrices([*EXPERTS, large], [GPU], need - 1)
    assert "--device-memory allows 12.00 GiB; allow more" in str(e.value)
    free["cuda:1"] = 5 * 2**30
    refuse_large_matrices([*EXPERTS, large], [GPU], None)
    for limit in (None, 2**40):
        with pytest.raises(ConversionError, match=r"5\.00 GiB are free on cuda:0, cuda:1; free some"):
            refuse_large_matrices([large], [GPU, SECOND], limit)
    free["cpu"] = 1
    refuse_large_matrices([large], [CPU], None)  # as before: what is free on a host is hard to know


@pytest.mark.parametrize("elements", [1, 2**21, 5 * 2**21, 2**30])
def test_batches_are_as_large_as_the_rule_says(elements: int):
    found = list(plan_batches(EXPERTS, NoMoments(), {}, Rule(elements)))
    assert [matrix for batch in found for matrix in batch] == EXPERTS
    most = max(1, elements // 2**21)
    assert all(len(batch) == min(most, 20) for batch in found[:-1])
    assert len(found[-1]) <= most


def test_devices_of_two_kinds_or_named_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_devices(["cpu", "cpu"]) == [CPU, CPU]
    assert find_devices(["cuda"]) == [torch.device("cuda")]
    assert find_devices(["cuda", "cuda:1"]) == [GPU, SECOND]
    with pytest.raises(ConversionError, match=r"--devices cuda:0,cpu: .* name devices of one kind"):
        find_devices(["cuda:0", "cpu"])
    with pytest.raises(ConversionError, match=r"--devices cuda,cuda:1,cuda:0: names a GPU twice"):
        find_devices(["cuda", "cuda:1", "cuda:0"])


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "ranks"), [("milo", 16), ("milo", 256), ("paper", 16), ("hqq", 0)])
def test_the_solver_keeps_to_the_memory_that_it_is_given(method: str, ranks: int):
    """Two matrices of 32 MiB in float32 at a time, in 800 MiB; cuBLAS has some tens of MiB of that for itself."""
    limit = 800 * 2**20
    matrices = [Matrix(f"experts.{index}.up_proj", Kind.ROUTED_EXPERT, 2048, 4096) for index in range(8)]
    recipe = Recipe(method, 64, max_rounds=3, base="hqq")
    rule = Rule(solver_weights([torch.device("cuda")], limit))

    def jobs():
        for batch in plan_batches(matrices, NoMoments(), {}, rule):
            weights = torch.randn(len(batch), 2048, 4096, pin_memory=True).mul_(0.05)
            yield Job(batch, weights, Moments(), [ranks] * len(batch), recipe, torch.bfloat16)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for done in Devices([torch.device("cuda")]).solve(jobs()):
        assert len(done.solved) == 2
    assert torch.cuda.max_memory_allocated() - before <= limit
