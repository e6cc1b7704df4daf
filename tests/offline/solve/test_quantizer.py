import pytest
import torch

from vllm_milo.kernels.triton import grid_fit
from vllm_milo.offline.nouns import METHODS, PLAIN_METHODS, Recipe
from vllm_milo.offline.solve.base.group import GroupQuantized, ScaleError, quantize_rtn
from vllm_milo.offline.solve.base.hqq import NORM, _step, quantize_hqq
from vllm_milo.offline.solve.base.least_squares import quantize_mse, refit
from vllm_milo.offline.solve.compensator.factors import store_factor, truncated_svd
from vllm_milo.offline.solve.methods import quantize_matrices
from vllm_milo.offline.solve.paper_loop import _Progress

QUANTIZERS = {"rtn": quantize_rtn, "hqq": quantize_hqq, "mse": quantize_mse}
PAPER = Recipe("paper")


def heavy_tailed(*shape):
    return torch.randn(shape) * torch.rand(shape[-2:]).square() * 0.1


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


def test_hqq_beats_rtn():
    weights = heavy_tailed(4, 128, 256)
    errors = [(quantize(weights, 64).dequantize() - weights).abs().mean() for quantize in (quantize_hqq, quantize_rtn)]
    assert errors[0] < 0.97 * errors[1]


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


def test_tiny_groups_of_a_normal_matrix_are_kept():
    weights = heavy_tailed(1, 64, 128)
    weights[0, 0, :64] *= 1e-6
    weights[0, 1, :64] = 3e-7
    result = quantize_hqq(weights, 64)
    assert (result.dequantize()[0, :2, :64] - weights[0, :2, :64]).abs().max() < 2.0**-14


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
    with pytest.raises(ScaleError, match="below fp16's smallest normal"):
        quantize_rtn(heavy_tailed(1, 64, 128) * 1e-6, 64)


@pytest.mark.parametrize("shape", [(2, 96, 64), (1, 64, 160)])
def test_truncated_svd_is_the_best_low_rank_approximation(shape):
    residual = torch.randn(shape, dtype=torch.float64).float()
    u, v = truncated_svd(residual, 16)
    values = torch.linalg.svdvals(residual)
    error = (residual - u.mT @ v).flatten(1).norm(dim=1)
    assert torch.allclose(error, values[:, 16:].norm(dim=1), rtol=1e-4)
    # the root of each singular value goes to both sides
    assert torch.allclose(u.norm(dim=-1), v.norm(dim=-1), rtol=1e-4)


def test_randomized_svd_is_close_and_seeded(monkeypatch):
    monkeypatch.setattr("vllm_milo.offline.solve.compensator.factors.EXACT_SIZE", 32)
    residual = torch.randn(2, 256, 320)
    found = [truncated_svd(residual, 24, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(found[0][0], found[1][0])
    u, v = found[0]
    best = torch.linalg.svdvals(residual)[:, 24:].norm(dim=1)
    assert ((residual - u.mT @ v).flatten(1).norm(dim=1) < 1.02 * best).all()


@pytest.mark.parametrize(("bits", "limit"), [(3, 0.35), (8, 0.01), (16, 0.004)])
def test_stored_factors(bits, limit):
    factor = torch.randn(2, 8, 128) * torch.logspace(-3, 3, 8)[:, None]
    factor[0, 0, :64] = -factor[0, 0, :64].abs()  # a group without positive values
    factor[1, 1] = 0
    stored = store_factor(factor, bits, torch.bfloat16)
    error = (stored.dequantize() - factor).norm(dim=-1) / factor.norm(dim=-1).clamp(min=1e-9)
    assert error.max() < limit
    assert stored.values.dtype == {3: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[bits]


def test_stop_rule():
    progress = _Progress(torch.ones(3, dtype=torch.bool))
    for step in range(8):
        progress.record(torch.tensor([0.9**step, 1.0, 1.0 + 0.1 * step]))
    # the first still improves; the flat and the diverging one have stopped
    assert progress.active.tolist() == [True, False, False]


def test_stop_rule_needs_two_windows():
    progress = _Progress(torch.ones(1, dtype=torch.bool))
    for _ in range(3):
        progress.record(torch.tensor([1.0]))
    assert progress.active.tolist() == [True]
    progress.record(torch.tensor([1.0]))
    assert progress.active.tolist() == [False]


def test_milo_reduces_the_error_and_reports_it():
    weights = heavy_tailed(3, 128, 192)
    plain = quantize_matrices(weights, 0, PAPER, torch.bfloat16)
    result = quantize_matrices(weights, 32, Recipe("paper", factor_bits=8), torch.bfloat16)
    assert (result.errors < 0.9 * plain.errors).all()
    expected = (weights - result.dequantize()).flatten(1).norm(dim=1) / weights.flatten(1).norm(dim=1)
    assert torch.allclose(result.errors, expected)
    assert (result.rounds >= 4).all()
    assert (result.rounds <= 20).all()


def test_batches_do_not_mix_matrices():
    weights = heavy_tailed(3, 64, 128)
    together = quantize_matrices(weights, 16, PAPER, torch.bfloat16)
    alone = [quantize_matrices(matrix[None], 16, PAPER, torch.bfloat16) for matrix in weights]
    assert torch.allclose(together.errors, torch.cat([one.errors for one in alone]), rtol=1e-4)
    assert torch.equal(together.rounds, torch.cat([one.rounds for one in alone]))


def test_methods():
    weights = heavy_tailed(1, 64, 128)
    errors = {}
    for method in METHODS:
        rank = 0 if method in PLAIN_METHODS else 16
        errors[method] = float(quantize_matrices(weights, rank, Recipe(method), torch.bfloat16).errors)
    assert sorted(errors, key=lambda method: errors[method]) == ["milo", "paper", "mse", "hqq", "rtn"]


def test_mse_beats_hqq_and_its_own_start():
    weights = heavy_tailed(4, 128, 256)

    def error(result):
        return float((result.dequantize() - weights).square().mean())

    assert error(quantize_mse(weights, 64)) < 0.9 * error(quantize_hqq(weights, 64))
    first = quantize_mse(weights, 64, fits=1)
    assert error(quantize_mse(weights, 64, start=first)) < error(first)


def test_mse_never_does_worse_than_rtn_in_any_group():
    weights = heavy_tailed(2, 64, 256) ** 3
    groups = [
        (quantize(weights, 64).dequantize() - weights).square().unflatten(-1, (-1, 64)).sum(-1)
        for quantize in (quantize_mse, quantize_rtn)
    ]
    assert (groups[0] <= groups[1] * (1 + 1e-5)).all()


def test_importance_moves_the_error_to_unimportant_inputs():
    weights = heavy_tailed(1, 64, 128)
    importance = torch.ones(1, 1, 128)
    importance[..., ::4] = 100
    plain, weighted = (
        (quantize_mse(weights, 64, given).dequantize() - weights).square() for given in (None, importance)
    )
    assert weighted[..., ::4].mean() < 0.7 * plain[..., ::4].mean()
    assert (weighted * importance).sum() < (plain * importance).sum()


@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 2, 320).reshape(1, 1, 320)])
def test_refit_finds_the_grid_that_made_the_weights(importance):
    codes = torch.randint(0, 8, (3, 5, 5, 64)).float()
    scale, zero = torch.rand(3, 5, 5).half() + 0.1, (torch.rand(3, 5, 5) * 7).half()
    weights = (scale.float().unsqueeze(-1) * (codes - zero.float().unsqueeze(-1))).flatten(-2)
    near = GroupQuantized(codes.flatten(-2).byte(), (scale.float() * 1.02).half(), zero)
    found = refit(weights, near, 64, importance, 3, (torch.empty_like(weights), torch.empty_like(weights)))
    assert torch.allclose(found.scale.float(), scale.float(), rtol=2e-3)
    assert torch.allclose(found.zero.float(), zero.float(), atol=2e-2)
    assert torch.equal(found.codes, codes.flatten(-2).byte())


def test_refit_lowers_the_error():
    weights = heavy_tailed(2, 64, 128)
    old = quantize_rtn(weights, 64)
    found = refit(weights, old, 64, None, 2, (torch.empty_like(weights), torch.empty_like(weights)))
    before, after = ((q.dequantize() - weights).square().unflatten(-1, (-1, 64)).sum(-1) for q in (old, found))
    assert (after <= before * 1.001).all()
    assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("weighed", ["no", "each", "shared"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 64, 256), (3, 5, 384), (2, 33, 128)])
def test_kernels_measure_what_torch_does(kernel_device, poisoned_empty, batch, rows, columns, group, weighed):
    """Of weights whose rows lie apart, as those of a slice."""
    wide = torch.randn(batch, rows, columns + 128) * 0.05
    weights = wide[..., 128:]
    grid = quantize_rtn(weights, group)
    share, importance = None, torch.tensor(1.0)
    if weighed != "no":
        importance = torch.rand(batch if weighed == "each" else 1, 1, columns)
        groups = importance.unflatten(-1, (-1, group))
        share = (groups / groups.sum(-1, keepdim=True)).flatten(-2)
    moved = wide.to(kernel_device)[..., 128:]
    scale, zero = grid.scale.to(kernel_device), grid.zero.to(kernel_device)
    codes = grid_fit.nearest_codes(moved, scale, zero).cpu()
    assert (codes != grid.codes).float().mean() < 1e-3  # a weight between two codes may go either way
    counted = (importance * torch.ones(weights.shape)).double().unflatten(-1, (-1, group))
    counted = counted / counted.sum(-1, keepdim=True)
    values, found_codes = (part.double().unflatten(-1, (-1, group)) for part in (weights, codes))
    found = grid_fit.code_sums(moved, scale, zero, None if share is None else share.to(kernel_device))
    for sums, expected in zip(found, (found_codes, found_codes**2, found_codes * values), strict=True):
        assert torch.allclose(sums.cpu().double(), (counted * expected).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 64, 256), (3, 5, 384), (2, 33, 128)])
def test_kernel_takes_the_half_quadratic_step_of_torch(kernel_device, poisoned_empty, batch, rows, columns, group):
    """Of weights whose rows lie apart; some lie on the grid, where the error has no sign and its power no value."""
    wide = torch.randn(batch, rows, columns + 128) * 0.05
    wide[..., 128 : 128 + columns // 2] = 0.0
    weights = wide[..., 128:]
    scale = (0.02 + 0.02 * torch.rand(batch, rows, columns // group)).half()
    zero = torch.randint(0, 8, scale.shape) + 0.3 * torch.randn(scale.shape) * (torch.rand(scale.shape) < 0.5)
    groups = weights.double().unflatten(-1, (-1, group))
    expected = _step(groups, scale)(zero.double(), 12.0)
    moved = wide.to(kernel_device)[..., 128:]
    found = grid_fit.half_quadratic_step(moved, scale.to(kernel_device), zero.to(kernel_device), 12.0, NORM)
    for values, right in zip(found, expected, strict=True):
        assert torch.allclose(values.cpu().double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_gpu_finds_the_zero_points_of_a_cpu(group):
    weights = heavy_tailed(3, 65, 384)
    weights[1, 7, :group] = 0.25
    here, there = quantize_hqq(weights, group), quantize_hqq(weights.cuda(), group)
    assert torch.equal(here.scale, there.scale.cpu())
    assert torch.allclose(here.zero.float(), there.zero.cpu().float(), atol=0.02)
    assert (here.codes != there.codes.cpu()).float().mean() < 0.01
