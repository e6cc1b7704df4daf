"""Jobs on several devices: the same results in the same order, and failures that name what failed."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import chain

import pytest
import torch

from vllm_milo.offline.errors import ConversionError, PassingError
from vllm_milo.offline.nouns import Kind, Matrix, Moments, Recipe
from vllm_milo.offline.spread.devices import Devices
from vllm_milo.offline.spread.job import Done, Job
from vllm_milo.offline.spread.remote import Remote

CPU = torch.device("cpu")
RECIPE = Recipe("milo", 64, max_rounds=2, base="hqq")


def job(number: int, largest: float = 0.0, places: tuple[str, ...] = ()) -> Job:
    """A batch of two matrices of some number, of which the second holds a value of some size."""
    generator = torch.Generator().manual_seed(number)
    weights = torch.randn(2, 64, 128, generator=generator).mul_(0.05).bfloat16()
    weights[1, 5, 7] = largest or weights[1, 5, 7]
    matrices = [Matrix(f"layers.{number}.{name}", Kind.ATTENTION, 64, 128) for name in ("first", "second")]
    return Job(matrices, weights, Moments(), [8, 16], RECIPE, torch.bfloat16, places)


def content(done: Done) -> list[tuple[str, list[torch.Tensor], object]]:
    found = []
    for matrix, result in done.solved:
        one = result.to(CPU)
        assert one.pair is not None
        tensors = [*one.base, *one.pair.u, *one.pair.v]
        found.append((matrix.name, tensors, done.report.matrices[matrix.name]))
    return found


def servers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_serve" in thread.name]


@pytest.mark.parametrize("number", [0, 1, 9])
def test_results_are_those_of_one_device_in_the_same_order(number: int):
    alone = [content(done) for done in Devices([CPU]).solve(map(job, range(number)))]
    with Devices([CPU] * 3) as devices:
        for _ in range(2):  # processes go on to the next layer
            spread = [content(done) for done in devices.solve(map(job, range(number)))]
            assert [[name for name, *_ in batch] for batch in spread] == [[n for n, *_ in batch] for batch in alone]
            for ours, theirs in zip(chain(*spread), chain(*alone), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
                assert ours[2] == theirs[2]
    assert not servers()


def test_another_process_solves_indeed():
    with closing_remote() as remote:
        remote.send(job(1))
        remote.send(job(2))
        for number in (1, 2):
            (here,) = Devices([CPU]).solve(iter([job(number)]))
            for ours, theirs in zip(content(remote.receive()), content(here), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


def closing_remote() -> closing[Remote]:
    return closing(Remote(CPU))


def test_an_error_in_another_process_is_the_one_of_this():
    with closing_remote() as remote:
        remote.send(job(1, largest=1e30))
        remote.send(job(2, largest=float("nan"), places=("a: tensor x", "b: tensor y")))
        remote.send(job(3))
        with pytest.raises(ConversionError, match=r"^layers\.1\.second: group 0 of row 5 needs scale") as raised:
            remote.receive()
        assert raised.value.__notes__ == ["on cpu"]
        with pytest.raises(ConversionError, match=r"^b: tensor y holds NaN or Inf \(matrix layers\.2\.second\)"):
            remote.receive()
        assert len(remote.receive().solved) == 2  # and it goes on


def test_a_defect_in_another_process_says_where():
    with closing_remote() as remote:
        remote.send(contradictory(1))
        with pytest.raises(RuntimeError, match=r"cpu: ValueError: method paper takes batches of one rank") as raised:
            remote.receive()
        assert "in quantize_matrices" in str(raised.value)


def contradictory(number: int) -> Job:
    whole = job(number)
    return Job(whole.matrices, whole.weights, Moments(), [8, 16], Recipe("paper", 64), torch.bfloat16)


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("bad", [0, 1, 4])
def test_results_before_a_failure_come_and_none_after(bad: int, devices: int):
    jobs = (job(number, largest=1e30 if number == bad else 0.0) for number in range(8))
    with Devices([CPU] * devices) as pool, closing(pool.solve(jobs)) as results:
        assert [next(results).solved[0][0].name for _ in range(bad)] == [f"layers.{n}.first" for n in range(bad)]
        with pytest.raises(ConversionError, match=rf"^layers\.{bad}\.second: "):
            next(results)
    assert not servers()


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("error", [PassingError("cannot read tensor x"), MemoryError()])
def test_an_error_of_reading_comes_in_its_turn(error: BaseException, devices: int):
    def jobs() -> Iterator[Job]:
        yield from map(job, range(4))
        raise error

    with Devices([CPU] * devices) as pool, closing(pool.solve(jobs(), reading=True)) as results:
        assert [next(results).solved[0][0].name for _ in range(4)] == [f"layers.{n}.first" for n in range(4)]
        with pytest.raises(type(error)) as raised:
            next(results)
    assert raised.value is error
    assert not servers()


def test_a_process_that_is_killed_is_named():
    with Devices([CPU, CPU]) as devices:

        def jobs() -> Iterator[Job]:
            for number in range(1000):
                process = devices._remotes[0]._process
                if number == 8 and process is not None:
                    process.send_signal(signal.SIGKILL)
                yield job(number)

        with closing(devices.solve(jobs())) as results, pytest.raises(PassingError) as raised:
            for _ in results:
                pass
    assert re.match(r"cpu: the process that solves there ended with status -9 while it had ", str(raised.value))
    assert not servers()


def test_work_that_is_given_up_leaves_no_process():
    with Devices([CPU] * 3) as devices:
        with closing(devices.solve(map(job, range(1000)))) as results:
            next(results)
        processes = [remote._process for remote in devices._remotes]
        assert all(process is None or process.poll() is not None for process in processes)
        assert any(process is not None for process in processes)
    assert not servers()


def test_no_more_jobs_are_in_memory_than_are_wanted():
    """However slowly results are taken."""
    made = []
    with Devices([CPU, CPU]) as devices:
        results = devices.solve(job(made.append(number) or number) for number in range(40))
        for taken, _ in enumerate(results, start=1):
            assert len(made) <= taken + 6
    assert len(made) == 40
