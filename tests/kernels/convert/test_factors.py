"""The kernels of low-rank factors, stored and learned, against torch."""

from __future__ import annotations

import copy

import pytest
import torch

from vllm_milo.kernels.convert import factor_fit
from vllm_milo.kernels.packing import MAX_CODE
from vllm_milo.offline.learn.adam import Pace
from vllm_milo.offline.learn.factor_latents import FactorLatents
from vllm_milo.offline.solve.compensator import low_rank
from vllm_milo.offline.solve.compensator.factors import FACTOR_ZERO, MIN_SCALE, StoredFactor, store_factor

SHAPES = [(1, 8, 64), (3, 5, 192), (2, 24, 128)]


def stored_on(device: str, factor: torch.Tensor, importance: torch.Tensor | None) -> StoredFactor:
    moved = None if importance is None else importance.to(device)
    clips = (low_rank.CLIPS[0] * low_rank.STEP, low_rank.CLIPS[1] * low_rank.STEP)
    arguments = (clips, low_rank.FITS, MIN_SCALE, (FACTOR_ZERO, MAX_CODE))
    return StoredFactor(*(part.cpu() for part in factor_fit.store_factor(factor.to(device), moved, *arguments)))


def costs(factor: torch.Tensor, stored: StoredFactor, importance: torch.Tensor | None) -> torch.Tensor:
    squares = (factor.double() - stored.dequantize().double()).square()
    squares = squares if importance is None else squares * importance
    return squares.unflatten(-1, (-1, 64)).sum(-1)


@pytest.mark.parametrize("weighed", ["no", "each", "shared"])
@pytest.mark.parametrize(("batch", "rank", "columns"), SHAPES)
def test_a_factor_is_stored_as_torch_stores_it(kernel_device, poisoned_empty, batch, rank, columns, weighed):
    """One that lies column by column, with a group of zeros and one of tiny values."""
    factor = torch.randn(batch, columns, rank).mT * torch.logspace(-3, 0, columns)
    factor[0, 0, :64] = 0
    factor[0, 1, :64] *= 1e-9
    importance = None if weighed == "no" else torch.rand(batch if weighed == "each" else 1, 1, columns)
    expected = low_rank._store(factor, 3, torch.bfloat16, importance)
    found = stored_on(kernel_device, factor, importance)
    assert found.values.dtype == torch.uint8
    assert found.scale is not None
    assert expected.scale is not None
    assert (found.values != expected.values).float().mean() < 2e-3  # a value between two codes may go either way
    assert torch.allclose(found.scale.float(), expected.scale.float(), rtol=2e-2, atol=0)
    assert torch.allclose(costs(factor, found, importance), costs(factor, expected, importance), rtol=1e-2, atol=1e-12)
    assert (found.values[0, 0, :64] == FACTOR_ZERO).all()


def learned(bits: int, trained: bool = True) -> FactorLatents:
    """Factors of ranks 8 and 16, padded to 16; all trained, or only the second matrix."""
    rows = torch.arange(16) < torch.tensor([[8], [16]])
    stored = store_factor(torch.randn(2, 16, 192) * rows.unsqueeze(-1), bits, torch.bfloat16)
    active = rows & torch.tensor([[trained], [True]])
    latents = FactorLatents(stored, bits, rows, active)
    if bits != 16:
        latents.values[:, 3] *= 3  # some beyond the last code, where nothing pulls
    return latents


def moved_to(latents: FactorLatents, device: str) -> FactorLatents:
    found = copy.deepcopy(latents)
    for of in (found, found._adam, getattr(found, "_adam_scale", None)):
        for name, value in vars(of).items() if of is not None else ():
            if isinstance(value, torch.Tensor):
                setattr(of, name, value.to(device))
    return found


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_a_step_moves_factors_as_torch_moves_them(kernel_device, bits, trained):
    expected = learned(bits, trained)
    learned_before = expected.values[0].clone()
    found = moved_to(expected, kernel_device)
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    same = found.current(dtype)
    for step in range(3):
        gradient = torch.randn(2, 16, 192).to(dtype)
        paces = {device: Pace(torch.device(device)) for device in ("cpu", kernel_device)}
        for pace in paces.values():
            pace.set(step, 10, warm_up=1)
        expected.step(gradient, 0.01, paces["cpu"])
        found._step_on_gpu(gradient.to(kernel_device), 0.01, paces[kernel_device])
    assert torch.allclose(found.values.cpu(), expected.values, rtol=1e-4, atol=1e-5)
    if bits != 16:
        assert torch.allclose(found.scale.cpu(), expected.scale, rtol=1e-4)
    assert found.current(dtype) is same  # a captured step reads and writes the same tensor
    off = (same.float().cpu() - expected.rounded()).abs() > 1e-4 + 1e-2 * expected.rounded().abs()
    assert off.float().mean() < 2e-3  # a value between two codes may go either way
    assert torch.equal(expected.current(torch.bfloat16), expected.rounded().bfloat16())
    assert (same[0, 8:] == 0).all()
    if not trained:
        assert torch.equal(found.values[0].cpu(), learned_before)
        assert not found._adam.first[0].any()
