"""Activations in the order in which the lanes of a warp take them, as the two launches before a GEMM write them.

What GEMMs make of them is compared with float64 where every tile is (:mod:`.test_fused_moe`).
"""

from __future__ import annotations

import pytest
import torch
from random_layers import moe_spec

from vllm_milo.kernels.launch import launch_mode
from vllm_milo.kernels.serving.activation import activate
from vllm_milo.kernels.serving.prepare import prepare
from vllm_milo.kernels.serving.routing import Routes

DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SPEC = moe_spec([[0, 0]], [[0]], 3)
SIZES = [64, 128, 192, 640]  # half units at the end, and more units than a program of the activation takes


def in_lane_order(x: torch.Tensor) -> torch.Tensor:
    """[rows, K] -> [rows, units·128]: of each 32 values, k = 16·i0 + 8·h + 2·t + b goes to 8·t + 4·h + 2·i0 + b."""
    whole = torch.nn.functional.pad(x, (0, -x.shape[1] % 128))
    return whole.reshape(x.shape[0], -1, 2, 2, 4, 2).permute(0, 1, 4, 3, 2, 5).reshape(whole.shape)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_prepared_rows(kernel_device: str, dtype: torch.dtype, size: int):
    """Every value, with zeros up to a whole unit; the sums beside them are of the same columns."""
    x = torch.randn(19, size, dtype=dtype)
    mode = launch_mode(torch.device(kernel_device), few_tokens=True)
    found, _, _ = prepare(x.to(kernel_device), None, 1, 8, 64, False, True, True, [], mode)
    assert found.lanes is not None
    assert torch.equal(found.lanes.cpu(), in_lane_order(x))
    sums = x.float().reshape(19, -1, 64).sum(2)
    columns = found.sums.cpu().permute(1, 0, 2).reshape(19, -1)
    torch.testing.assert_close(columns[:, : sums.shape[1]], sums, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_activated_rows(kernel_device: str, dtype: torch.dtype, size: int):
    """The same values as in the order of k, with zeros up to a whole unit."""
    device = torch.device(kernel_device)
    routes = Routes(torch.zeros(3, 2, dtype=torch.int32, device=device), None)
    y = torch.randn(2, 6, 2 * size, device=device)
    mode = launch_mode(device, few_tokens=True)
    found = activate(y, SPEC, None, routes, 64, True, dtype, mode)
    assert found.lanes is not None
    assert torch.equal(found.lanes.cpu(), in_lane_order(found.x.cpu()))
    assert activate(y, SPEC, None, routes, 64, False, dtype, mode).lanes is None
