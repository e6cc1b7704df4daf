"""The interpreter made quicker still finds what it did."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@triton.jit
def _combine(a, b, out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    first, second = tl.load(a + places), tl.load(b)
    if OPERATION == "add":
        found = first + second
    elif OPERATION == "sub":
        found = first - second
    else:
        found = first * second
    tl.store(out + places, found)


def combine(operation: str, first: list[int], second: int, dtype: torch.dtype) -> list[int]:
    """Combine each of the first numbers with the second."""
    a, b = torch.tensor(first, dtype=dtype), torch.tensor([second], dtype=dtype)
    out = torch.zeros_like(a)
    _combine[(1,)](a, b, out, operation, len(first))
    return out.tolist()


@pytest.mark.parametrize(
    ("operation", "first", "second", "dtype"),
    [
        ("add", [0, 2**31 - 1], 1, torch.int32),
        ("sub", [0, -(2**31)], 1, torch.int32),
        ("mul", [1, 2**16], 2**15, torch.int32),
        ("add", [0, 127], 1, torch.int8),
        ("sub", [1, 0], 1, torch.uint8),
    ],
)
def test_integers_that_overflow_are_found(operation: str, first: list[int], second: int, dtype: torch.dtype):
    name = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}[operation]
    assert combine(operation, [first[0]] * 2, second, dtype) == [name(first[0], second)] * 2
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow detected for operation"):
        combine(operation, first, second, dtype)


def test_64_bits_wrap():
    assert combine("add", [2**63 - 1, 0], 1, torch.int64) == [-(2**63), 1]
    assert combine("mul", [2**62, 3], 4, torch.int64) == [0, 12]


@triton.jit
def _outer(a, b, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    table = tl.load(a + rows)[:, None] * tl.load(b + columns)[None, :]
    tl.static_assert(table.shape[0] == ROWS)
    tl.static_assert(table.shape[1] == COLUMNS)
    places = rows[:, None] * COLUMNS + columns[None, :]
    tl.store(out + places, table.to(tl.float16))
    tl.store(out + ROWS * COLUMNS, tl.sum(table))


def test_shapes_broadcast_and_types_are_cast():
    a, b = torch.arange(4, dtype=torch.int8), torch.linspace(-1, 1, 8)
    out = torch.zeros(33, dtype=torch.float16)
    _outer[(1,)](a, b, out, 4, 8)
    expected = a[:, None] * b
    assert torch.equal(out[:-1].view(4, 8), expected.half())
    assert float(out[-1]) == pytest.approx(float(expected.sum()), abs=1e-3)
