"""Codes, scales, zero points and factors as trained numbers: where they begin, their gradients, where steps lead."""

from __future__ import annotations

import copy

import pytest
import torch

from vllm_milo.offline.learn.adam import BETAS, Adam, Pace
from vllm_milo.offline.learn.factor_latents import FactorLatents, nearest
from vllm_milo.offline.learn.latents import BaseLatents, Latents, Rates
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.solve.base.group import MAX_SCALE, MIN_SCALE, GroupQuantized, quantize_rtn
from vllm_milo.offline.solve.compensator.factors import FACTOR_ZERO
from vllm_milo.offline.solve.compensator.low_rank import StoredPair
from vllm_milo.offline.solve.methods import quantize_matrices

BITS = (3, 8, 16)
RAGGED = [16, 8, 24]
N, K = 64, 128


def solve(bits: int, ranks: list[int], group_size: int = 32) -> tuple[torch.Tensor, GroupQuantized, StoredPair | None]:
    weights = torch.randn(len(ranks), N, K) * 0.05
    recipe = Recipe(group_size=group_size, factor_bits=bits, max_rounds=2)
    result = quantize_matrices(weights, ranks, recipe, torch.bfloat16)
    return weights, result.base, StoredPair(result.u, result.v) if any(ranks) else None


def everything(bits: int, ranks: list[int], active: list[bool] | None = None) -> tuple[torch.Tensor, Latents]:
    weights, base, pair = solve(bits, ranks)
    return weights, Latents(weights, base, pair, ranks, bits, torch.tensor(active or [True] * len(ranks)))


def pace_of(step: int = 0, steps: int = 100, warm_up: int = 1) -> Pace:
    pace = Pace(torch.device("cpu"))
    pace.set(step, steps, warm_up)
    return pace


def equal(found: GroupQuantized, expected: GroupQuantized) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def same_pair(found: StoredPair, expected: StoredPair) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.values.dtype == theirs.values.dtype
        assert torch.equal(mine.values, theirs.values)
        assert (mine.scale is None) == (theirs.scale is None)
        if mine.scale is not None:
            assert mine.scale.dtype == torch.float16
            assert torch.equal(mine.scale, theirs.scale)


def of_adam(adam: Adam) -> torch.Tensor:
    """The gradient that Adam took in its only step so far."""
    return adam.first.double() / (1 - BETAS[0])


def descend(weights: torch.Tensor, latents: Latents, steps: int, rates: Rates | None = None) -> list[float]:
    """Lower the squared error of the outputs on correlated inputs; return it before each step and at the end."""
    inputs = torch.randn(16, K, generator=torch.Generator().manual_seed(1))
    out, losses = torch.empty_like(weights), []
    latents.write(out)
    for step in range(steps):
        errors = (out - weights) @ inputs.mT
        losses.append(float(errors.square().sum()))
        latents.step(2 * errors @ inputs, out, rates or Rates(), pace_of(step, steps))
    return [*losses, float(((out - weights) @ inputs.mT).square().sum())]


# where they begin


@pytest.mark.parametrize("ranks", [RAGGED, [8, 8, 8]])
@pytest.mark.parametrize("bits", BITS)
def test_they_begin_at_the_solvers_result(bits: int, ranks: list[int]):
    weights, base, pair = solve(bits, ranks)
    latents = Latents(weights, base, pair, ranks, bits, torch.ones(3, dtype=torch.bool))
    found_base, found_pair = latents.stored()
    assert equal(found_base, base)
    same_pair(found_pair, pair)
    out = torch.empty_like(weights)
    latents.write(out)
    expected = base.dequantize() + pair.u.dequantize().mT @ pair.v.dequantize()
    assert torch.allclose(out, expected, atol=1e-6)


def test_without_rank_there_are_no_factors():
    weights, base, _ = solve(3, [0, 0])
    latents = Latents(weights, base, None, [0, 0], 3, torch.ones(2, dtype=torch.bool))
    descend(weights, latents, 3)
    assert latents.stored()[1] is None
    assert not equal(latents.stored()[0], base)


def test_a_latent_begins_where_the_weight_lies_but_rounds_to_the_solvers_code():
    """Far off where the solver's code is not the nearest, as with feedback of errors."""
    weights, base, _ = solve(3, [0])
    codes = base.codes.clone()
    codes[0, 0, :4] = (codes[0, 0, :4] + 3) % 8
    latents = BaseLatents(weights, base._replace(codes=codes), torch.tensor([True]))
    assert torch.equal(latents.stored().codes, codes)
    scale, zero = base.scale.float().repeat_interleave(32, -1), base.zero.float().repeat_interleave(32, -1)
    exact = weights / scale + zero
    near = (exact - codes).abs() < 0.44
    assert near.float().mean() > 0.6
    assert torch.allclose(latents.latent[near], exact[near], atol=1e-5)
    assert ((latents.latent - codes).abs() <= 0.451).all()


@pytest.mark.parametrize("bits", BITS)
def test_padded_rows_stay_zero(bits: int):
    weights, latents = everything(bits, RAGGED)
    descend(weights, latents, 12, Rates(factors=0.1))
    zero = FACTOR_ZERO if bits == 3 else 0
    for factor in latents.stored()[1]:
        for values, rank in zip(factor.values, RAGGED, strict=True):
            assert (values[rank:] == zero).all()
            assert (values[:rank] != zero).any()
        assert (factor.dequantize()[1, 8:] == 0).all()


# gradients


def straight(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, whose gradient is that of ``values``."""
    return values + (rounded - values).detach()


def test_gradients_of_the_base_are_those_of_straight_through_rounding():
    weights, base, _ = solve(3, [0, 0])
    latents = BaseLatents(weights, base, torch.ones(2, dtype=torch.bool))
    latents.latent[0, 0, :40] += torch.linspace(-6, 6, 40)  # some far out of range
    latents.change.uniform_(-0.1, 0.1)
    latents.zero.add_(torch.randn(latents.zero.shape) * 0.1)
    gradient = torch.randn(weights.shape)

    latent, change, zero = (part.double().requires_grad_() for part in (latents.latent, latents.change, latents.zero))
    scale = straight(latents.begin_scale.double() * (1 + change), latents.scale.double())
    kept = latent.clamp(-0.5, 7.5)
    codes = straight(kept, torch.floor(latent + 0.5).clamp(0, 7)).unflatten(-1, (-1, 32))
    steps = codes - straight(zero, zero.half().double()).unsqueeze(-1)
    values = (steps * scale.unsqueeze(-1)).flatten(-2)
    (values * gradient.double()).sum().backward()

    out = torch.empty_like(weights)
    latents.write(out)
    assert torch.allclose(out.double(), values, atol=1e-6)
    latents.step(gradient, out, Rates(), pace_of())
    for adam, leaf in ((latents.adam_latent, latent), (latents.adam_change, change), (latents.adam_zero, zero)):
        assert torch.allclose(of_adam(adam), leaf.grad, rtol=1e-4, atol=1e-6)
        assert leaf.grad.abs().max() > 0.01
    assert (latent.grad[0, 0, :40] == 0).any()


@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_factors_are_those_of_straight_through_rounding(bits: int):
    weights, latents = everything(bits, RAGGED)
    low, high = {3: (-4, 3), 8: (-127, 127), 16: (0, 0)}[bits]
    for factor in latents.pair:
        factor.values.mul_(1 + 0.3 * torch.randn(factor.values.shape))  # some out of range
    gradient = torch.randn(weights.shape)

    leaves, rounded = [], []
    for factor in latents.pair:
        values = factor.values.double().requires_grad_()
        leaves.append([values])
        if bits == 16:
            rounded.append(straight(values, factor.values.bfloat16().double()))
            continue
        scale = factor.scale.double().requires_grad_()
        leaves[-1].append(scale)
        steps = values.unflatten(-1, (-1, 64)) / straight(scale, scale.half().double()).unsqueeze(-1)
        stored = (factor.values.unflatten(-1, (-1, 64)) / factor.scale.half().float().unsqueeze(-1)).add(0.5).floor()
        kept = straight(steps.clamp(low - 0.5, high + 0.5), stored.clamp(low, high).double())
        rounded.append((kept * scale.unsqueeze(-1)).flatten(-2) * factor.rows.double())
    ((rounded[0].mT @ rounded[1]) * gradient.double()).sum().backward()

    for factor, expected in zip(latents.pair, rounded, strict=True):
        assert torch.allclose(factor.rounded().double(), expected, atol=1e-6)
    latents.step(gradient, torch.empty_like(weights), Rates(), pace_of())
    for factor, (values, *scales) in zip(latents.pair, leaves, strict=True):
        own = values.grad * factor.rows.double()
        assert torch.allclose(of_adam(factor._adam), own, rtol=1e-3, atol=1e-5)
        assert own.abs().max() > 0.01
        for scale in scales:
            assert torch.allclose(of_adam(factor._adam_scale), scale.grad, rtol=1e-3, atol=1e-3)


def test_adam_is_torchs():
    values, rate = torch.randn(6, 5), 0.03
    theirs = values.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=rate, betas=BETAS, eps=1e-12)
    adam, pace = Adam(values), Pace(torch.device("cpu"))
    for step in range(5):
        gradient = torch.randn(6, 5)
        pace.set(step, 5, warm_up=3)
        optimizer.param_groups[0]["lr"] = rate * float(pace.share)
        theirs.grad = gradient
        optimizer.step()
        adam.move(values, gradient, rate, pace)
    assert torch.allclose(values, theirs.detach(), atol=1e-6)


def test_rates_rise_and_fall():
    pace, shares = Pace(torch.device("cpu")), []
    for step in range(100):
        pace.set(step, 100)
        shares.append(float(pace.share))
    assert shares[0] == pytest.approx(0.1)
    assert shares.index(max(shares)) in (8, 9)
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert 0 < shares[-1] < 0.001


# steps


@pytest.mark.parametrize("bits", BITS)
def test_steps_lower_the_loss(bits: int):
    weights, latents = everything(bits, RAGGED)
    losses = descend(weights, latents, 40)
    assert losses[-1] < 0.5 * losses[0]
    base, pair = latents.stored()
    stored = base.dequantize() + pair.u.dequantize().mT @ pair.v.dequantize()
    out = torch.empty_like(weights)
    latents.write(out)
    assert torch.allclose(out, stored, atol=1e-6)  # what is trained is what gets stored


@pytest.mark.parametrize("part", ["codes", "scale", "zero", "factors"])
def test_each_part_lowers_the_loss_by_itself(part: str):
    weights, latents = everything(3, [8, 8])
    before_base, before_pair = latents.stored()
    latents.base.begin_scale.mul_(1.03)
    latents.base.zero.add_(0.05)
    latents.pair[0].values.mul_(0.8)
    losses = descend(
        weights, latents, 25, Rates(**dict.fromkeys(("codes", "scale", "zero", "factors"), 0.0) | {part: 0.01})
    )
    assert losses[-1] < losses[0]
    base, pair = latents.stored()
    assert torch.equal(base.codes, before_base.codes) == (part != "codes")
    assert torch.equal(pair.v.values, before_pair.v.values) == (part != "factors")


@pytest.mark.parametrize("bits", BITS)
def test_inactive_matrices_stay(bits: int):
    weights, base, pair = solve(bits, RAGGED)
    latents = Latents(weights, base, pair, RAGGED, bits, torch.tensor([True, False, True]))
    descend(weights, latents, 10, Rates(0.1, 0.01, 0.05, 0.05))
    found, found_pair = latents.stored()
    for mine, theirs in ((found, base), *(((a.values,), (b.values,)) for a, b in zip(found_pair, pair, strict=True))):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a[1], b[1])
            assert not torch.equal(a[0], b[0])
    if bits != 16:
        assert all(torch.equal(a.scale[1], b.scale[1]) for a, b in zip(found_pair, pair, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_wild_steps_stay_in_the_format(bits: int):
    weights, latents = everything(bits, [8, 8])
    out = torch.empty_like(weights)
    for step in range(6):
        gradient = torch.randn(weights.shape) * 1e4
        latents.step(gradient, out, Rates(codes=5.0, scale=2.0, zero=1e5, factors=3.0), pace_of(step))
        base, pair = latents.stored()
        assert base.codes.max() <= 7
        assert ((base.scale.float() >= MIN_SCALE) & (base.scale.float() <= MAX_SCALE)).all()
        assert torch.isfinite(base.zero).all()
        assert torch.isfinite(out).all()
        for factor in pair:
            assert torch.isfinite(factor.dequantize()).all()
            assert bits != 3 or factor.values.max() <= 7
            assert bits != 8 or factor.values.min() >= -127
            assert factor.scale is None or (factor.scale > 0).all()
    assert (base.scale.float() == MIN_SCALE).any()
    assert latents.base.latent.min() < -1
    assert latents.base.latent.max() > 8


def test_halves_round_up():
    assert nearest(torch.tensor([-0.5, 0.5, 1.5, 2.49, 6.5])).tolist() == [0, 1, 2, 2, 7]


def test_a_factor_of_zeros_takes_steps_of_no_size():
    _, _, pair = solve(3, [8])
    zeros = pair.u._replace(values=torch.full_like(pair.u.values, FACTOR_ZERO))
    factor = FactorLatents(zeros, 3, torch.ones(1, 8, dtype=torch.bool))
    factor.step(torch.randn(1, 8, N), 0.1, pace_of())
    assert torch.equal(factor.stored().values, zeros.values)
    assert torch.isfinite(factor.scale).all()


# the kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 16, 128), (3, 5, 256), (2, 19, 128)])
def test_the_kernel_does_what_torch_does(
    kernel_device: str, batch: int, rows: int, columns: int, group: int, dtype: torch.dtype
):
    """On parts of larger tensors, as the halves of fused experts are; one matrix is not trained."""
    from vllm_milo.kernels.convert.learn import step_base

    weights = torch.randn(batch, rows, columns) * 0.05
    active = torch.ones(batch, dtype=torch.bool)
    active[1:2] = False
    expected = BaseLatents(weights, quantize_rtn(weights, group), active)
    expected.latent[:, :2] += torch.linspace(-6, 6, columns)
    expected.change.uniform_(-0.01, 0.01)
    found = copy.copy(expected)
    for name, part in vars(expected).items():
        if isinstance(part, torch.Tensor):
            setattr(found, name, part.clone().to(kernel_device))
        elif isinstance(part, Adam):
            setattr(found, name, Adam(part.first.to(kernel_device)))
    gradients, outs = torch.zeros(batch, 2 * rows, columns), torch.full((batch, 2 * rows, columns), 9.0)
    out, moved = outs.to(dtype), outs.to(kernel_device, dtype)
    rates = Rates(codes=0.05, scale=0.01, zero=0.02)
    for step in range(3):
        gradients.normal_(std=0.1)
        given, pace = gradients.to(dtype), pace_of(step + 2, 9, warm_up=4)
        expected.step(given[:, rows:], out[:, rows:], rates, pace)
        limits = (MIN_SCALE, MAX_SCALE)
        by_part = (rates.codes, rates.scale, rates.zero)
        step_base(
            found,
            given.to(kernel_device)[:, rows:],
            moved[:, rows:],
            by_part,
            BETAS,
            limits,
            pace.values.to(kernel_device),
        )
    for name in ("latent", "change", "zero"):
        assert torch.allclose(getattr(found, name).cpu(), getattr(expected, name), atol=1e-4), name
    moved = moved.cpu()
    assert (moved[:, :rows] == 9).all()
    off = (moved[:, rows:] - out[:, rows:]).abs() > 1e-3
    assert off.float().mean() < 2e-3  # a latent between two codes may go either way
    assert (moved[:, rows:] != 9).all()
    if batch > 1:
        assert equal(GroupQuantized(*(part[1].cpu() for part in found.stored())), quantized_part(expected, 1))


def quantized_part(latents: BaseLatents, index: int) -> GroupQuantized:
    return GroupQuantized(*(part[index] for part in latents.stored()))


def test_the_kernel_refuses_rows_that_lie_apart(kernel_device: str):
    from vllm_milo.kernels.convert.learn import step_base

    weights = torch.randn(1, 8, 64)
    latents = BaseLatents(weights, quantize_rtn(weights, 32), torch.tensor([True]))
    wide = torch.zeros(1, 8, 128, device=kernel_device)[..., :64]
    with pytest.raises(ValueError, match="rows must be contiguous and K = 64 apart"):
        step_base(latents, wide, wide, (0.1, 0.1, 0.1), BETAS, (MIN_SCALE, MAX_SCALE), torch.ones(3))


@pytest.mark.gpu
def test_steps_on_a_gpu_are_those_of_the_cpu():
    weights, base, pair = solve(3, RAGGED)
    active, stored = torch.tensor([True, False, True]), []
    for device in ("cpu", "cuda"):
        moved = StoredPair(
            *(factor._replace(values=factor.values.to(device), scale=factor.scale.to(device)) for factor in pair)
        )
        there, on_device = weights.to(device), GroupQuantized(*(part.to(device) for part in base))
        latents = Latents(there, on_device, moved, RAGGED, 3, active.to(device))
        out, pace = torch.empty_like(there), Pace(torch.device(device))
        latents.write(out)
        for step in range(5):
            pace.set(step, 5)
            latents.step(2 * (out - there), out, Rates(), pace)
        stored.append(latents.stored()[0])
    assert (stored[1].codes.cpu() != stored[0].codes).float().mean() < 5e-3
    assert torch.allclose(stored[1].scale.cpu().float(), stored[0].scale.float(), rtol=5e-3)
    assert torch.equal(stored[1].codes[1].cpu(), base.codes[1])
