"""What every quantizer of groups promises: its domain, nearest codes, odd groups, errors."""

from __future__ import annotations

import pytest
import torch
from random_matrices import heavy_tailed

from vllm_milo.offline.solve.base.group import ScaleError, quantize_rtn
from vllm_milo.offline.solve.base.hqq import quantize_hqq
from vllm_milo.offline.solve.base.least_squares import quantize_mse

QUANTIZERS = {"rtn": quantize_rtn, "hqq": quantize_hqq, "mse": quantize_mse}


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=list(QUANTIZERS))
@pytest.mark.parametrize("group", [32, 64, 128])
def test_shapes_and_domain(quantize, group):
    result = quantize(heavy_tailed(2, 64, 256), group)
    assert result.codes.dtype == torch.uint8
    assert result.codes.shape == (2, 64, 256)
    assert int(result.codes.max()) <= 7
    for tensor in (result.scale, result.zero):
        assert tensor.dtype == torch.float16
        assert tensor.shape == (2, 64, 256 // group)
        assert torch.isfinite(tensor).all()
    assert (result.scale >= 2.0**-14).all()


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=list(QUANTIZERS))
def test_codes_are_the_nearest_for_the_stored_scale_and_zero(quantize):
    weights = heavy_tailed(1, 64, 128)
    result = quantize(weights, 64)
    grid = torch.arange(8.0)
    values = result.scale.float().repeat_interleave(64, -1).unsqueeze(-1) * (
        grid - result.zero.float().repeat_interleave(64, -1).unsqueeze(-1)
    )
    nearest = (values - weights.unsqueeze(-1)).abs().min(-1).values
    assert torch.allclose((result.dequantize() - weights).abs(), nearest, atol=1e-6)


def test_rtn_is_within_half_a_step():
    weights = heavy_tailed(1, 64, 128)
    result = quantize_rtn(weights, 64)
    step = result.scale.float().repeat_interleave(64, -1)
    assert ((result.dequantize() - weights).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=list(QUANTIZERS))
@pytest.mark.parametrize(
    ("constant", "scale", "zero", "code"),
    [(0.25, 0.25, 0, 1), (-0.25, 0.25, 1, 0), (0.0, 1.0, 0, 0)],
)
def test_constant_groups(quantize, constant, scale, zero, code):
    weights = heavy_tailed(1, 64, 128)
    weights[0, 3, 64:] = constant
    result = quantize(weights, 64)
    assert (float(result.scale[0, 3, 1]), float(result.zero[0, 3, 1])) == (scale, zero)
    assert (result.codes[0, 3, 64:] == code).all()


def test_nearly_constant_group_has_a_finite_zero():
    weights = heavy_tailed(1, 64, 128)
    weights[0, 0, :64] = 1.0 + torch.rand(64) * 1e-6
    result = quantize_rtn(weights, 64)
    assert torch.isfinite(result.zero).all()
    assert (result.dequantize()[0, 0, :64] - 1).abs().max() < 1e-3


def test_scales_that_do_not_fit_are_errors():
    weights = heavy_tailed(1, 64, 128)
    weights[0, 5, 70] = 1e6
    with pytest.raises(ScaleError, match=r"group 1 of row 5 needs scale .*, above fp16's 65504"):
        quantize_rtn(weights, 64)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("quantize", [quantize_rtn, quantize_hqq, quantize_mse])
def test_matrices_below_the_normal_range_are_as_exact_as_scales_allow(quantize, size: float):
    """Scales below fp16's normal range are multiples of 2^-24: at most half of that is lost in each step of a code."""
    weights = heavy_tailed(1, 64, 128)
    normal, tiny = quantize(weights, 64), quantize(weights * size, 64)
    assert (tiny.scale > 0).all()
    errors = [(weights - normal.dequantize()).norm(), (weights - tiny.dequantize() / size).norm()]
    assert errors[1] <= errors[0] * 1.01 + 2.0**-25 * 7 / size * weights.numel() ** 0.5
    assert errors[1] <= max(1.1 * errors[0], 1.001 * weights.norm())
