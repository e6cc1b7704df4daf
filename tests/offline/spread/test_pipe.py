"""Objects with tensors through a pipe."""

from __future__ import annotations

import io

import pytest
import torch

from vllm_milo.offline.nouns import Moments
from vllm_milo.offline.solve.base.group import ScaleError
from vllm_milo.offline.spread import pipe


def through(value: object) -> object:
    file = io.BytesIO()
    pipe.send(file, value)
    pipe.send(file, "the next")
    file.seek(0)
    found = pipe.receive(file)
    assert pipe.receive(file) == "the next"
    with pytest.raises(EOFError, match="closed the pipe"):
        pipe.receive(file)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int64])
@pytest.mark.parametrize("shape", [(3, 4, 8), (0, 4), ()])
def test_tensors_arrive_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]):
    sent = torch.randn(shape).mul(50).to(dtype)
    found = through({"a": sent, "b": [1, "two"]})
    assert found["b"] == [1, "two"]
    assert (found["a"].dtype, found["a"].shape) == (dtype, sent.shape)
    assert torch.equal(found["a"], sent)
    found["a"].zero_()  # it may be written to
    assert torch.equal(found["a"], torch.zeros_like(sent))


def test_views_and_objects_that_hold_tensors():
    whole = torch.randn(4, 6, 8)
    found = through(Moments(whole[1:3, :, ::2].mT))
    assert torch.equal(found.inputs, whole[1:3, :, ::2].mT)
    assert found.outputs is None


def test_errors_keep_their_kind_and_notes():
    error = ScaleError("a group is too large")
    error.add_note("on cuda:1")
    found = through(error)
    assert isinstance(found, ScaleError)
    assert (str(found), found.__notes__) == ("a group is too large", ["on cuda:1"])


def test_a_message_that_breaks_off():
    file = io.BytesIO()
    pipe.send(file, torch.arange(1000))
    with pytest.raises(EOFError):
        pipe.receive(io.BytesIO(file.getvalue()[:-1]))
