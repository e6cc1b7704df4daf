"""Jobs in a thread: in order, few at a time, and nothing after a failure."""

from __future__ import annotations

import threading

import pytest

from vllm_milo.offline.durable.worker import Worker


def test_jobs_are_done_in_order_in_another_thread():
    worker, done = Worker(), []
    for number in range(20):
        worker.hand_over(lambda number=number: done.append((number, threading.current_thread())))
    worker.wait()
    worker.close()
    assert [number for number, _ in done] == list(range(20))
    assert threading.current_thread() not in {thread for _, thread in done}
    assert not any(thread.is_alive() for _, thread in done)


def test_one_job_waits_beside_the_one_that_is_done():
    worker, go, begun, handed = Worker(), threading.Event(), threading.Event(), []

    def job() -> None:
        begun.set()
        go.wait()

    def hand_over() -> None:
        for number in range(3):
            worker.hand_over(job)
            handed.append(number)

    other = threading.Thread(target=hand_over)
    other.start()
    begun.wait()
    other.join(0.2)
    assert other.is_alive()
    assert handed == [0, 1]
    go.set()
    other.join()
    worker.close()
    assert handed == [0, 1, 2]


def fail() -> None:
    raise OSError("full")


def test_a_failure_is_raised_at_the_next_job_and_at_the_end():
    worker, done = Worker(), []
    worker.hand_over(fail)
    with pytest.raises(OSError, match="full"):
        worker.wait()
    with pytest.raises(OSError, match="full"):
        worker.hand_over(lambda: done.append(1))
    with pytest.raises(OSError, match="full"):
        worker.wait()
    worker.close()
    assert done == []
    assert isinstance(worker.error, OSError)


def test_closing_does_what_was_handed_over_and_nothing_after_a_failure():
    worker, done = Worker(), []
    worker.hand_over(lambda: done.append(1))
    worker.hand_over(lambda: done.append(2))
    worker.close()
    assert done == [1, 2]
    go = threading.Event()
    worker.hand_over(lambda: go.wait() and fail())
    worker.hand_over(lambda: done.append(3))
    go.set()
    worker.close()
    assert done == [1, 2]
    Worker().close()
