"""What is made while the item before it is used."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from vllm_milo.offline.spread.ahead import ahead


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "milo-reader"]


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_items_come_in_order_and_the_thread_ends():
    assert list(ahead(range(50))) == list(range(50))
    assert list(ahead([])) == []
    assert not readers()


def test_the_next_item_is_made_while_one_is_used_and_no_other():
    made = []
    with closing(ahead(made.append(number) or number for number in range(10))) as items:
        for number in items:
            wait_for(lambda number=number: len(made) == min(number + 2, 10))
            time.sleep(0.02)
            assert len(made) == min(number + 2, 10)


def test_an_error_comes_in_the_place_of_its_item():
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    with closing(ahead(items())) as given:
        assert [next(given) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="the disk is gone"):
            next(given)
    assert not readers()


def test_closing_early_ends_the_thread_and_closes_what_makes_items():
    ended = []

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            ended.append(True)

    with closing(ahead(items())) as given:
        assert next(given) == 0
    assert ended == [True]
    assert not readers()
