"""The ``hqq`` quantizer: the zero point of every group by half-quadratic splitting (the paper's eq. 4 to 9)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_milo.kernels.packing import MAX_CODE

from .group import GroupQuantized, encode, fit_zero, min_max

NORM = 0.7  # p of the paper's l_p norm, and of HQQ's defaults
BETA = 10.0
KAPPA = 1.01
ROUNDS = 20
_Step = Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
"""From zero points [..., N, G] and β to the sums of absolute errors and the next zero points, both like them."""


def quantize_hqq(weights: torch.Tensor, group_size: int) -> GroupQuantized:
    """HQQ: the scale of round-to-nearest, and the zero point that the half-quadratic solver finds.

    Minimizes the l_p norm, p = 0.7, of the error over z alone (the paper's eq. 4-9, HQQ's constants):
    alternates the shrinkage of the error with the mean that is optimal for it, and stops a matrix when its
    mean absolute error no longer falls.

    Args:
        weights: float32 [..., N, K]; on GPUs [B, N, K].
        group_size: consecutive weights of a row that share one scale and zero point; divides K.

    Raises:
        ScaleError: a group's range does not fit fp16.
    """
    groups = weights.unflatten(-1, (-1, group_size))
    scale, zero = min_max(groups)
    return encode(weights, scale, fit_zeros(weights, scale, zero))


def fit_zeros(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the zero points, fp16 [..., N, G], that the half-quadratic solver finds for given scales.

    Args:
        weights: as in :func:`quantize_hqq`.
        scale: fp16 [..., N, G].
        zero: where it begins, [..., N, G]; groups of equal weights keep it.
    """
    groups = weights.unflatten(-1, (scale.shape[-1], -1))
    constant = groups.amax(-1) == groups.amin(-1)
    step = _step_on_gpu(weights, scale) if weights.is_cuda else _step(groups, scale)
    current, best_zero = zero.float(), zero.float()
    best_error = torch.full(groups.shape[:-3], torch.inf, device=groups.device)
    beta, settled = BETA, _Settled()
    for _ in range(ROUNDS):
        sizes, update = step(current, beta)
        error = sizes.sum(dim=(-2, -1))
        improved = error < best_error
        if settled.after(improved):
            break
        best_error = torch.where(improved, error, best_error)
        best_zero = torch.where(improved[..., None, None], current, best_zero)
        current = torch.where(improved[..., None, None] & ~constant, update, current)
        beta *= KAPPA
    return fit_zero(best_zero)


class _Settled:
    """Tells when a round improves no matrix any more.

    A GPU is asked for the round before the last, so that it works on the last while the host waits: after a round that
    improves nothing, another changes nothing.
    """

    def __init__(self) -> None:
        self._before: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def after(self, improved: torch.Tensor) -> bool:
        """Return whether no round is needed after those known of, with what the latest improved, bool [...]."""
        if not improved.is_cuda:
            return not improved.any()
        asked, self._before = self._before, _sent_to_host(improved.any())
        if asked is None:
            return False
        asked[1].synchronize()
        return not asked[0].item()


def _sent_to_host(value: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Return where a value of the GPU will lie on the host, and what tells that it does."""
    place = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    place.copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return place, event


def _step_on_gpu(weights: torch.Tensor, scale: torch.Tensor) -> _Step:
    """Return a round as one kernel, which reads the weights once."""
    from vllm_milo.kernels.convert import grid_fit

    return lambda zero, beta: grid_fit.half_quadratic_step(weights, scale, zero, beta, NORM)


def _step(groups: torch.Tensor, scale: torch.Tensor) -> _Step:
    """Return a round in torch, for groups [..., G, g], with work space that all rounds share."""
    width = scale.float().unsqueeze(-1)
    scaled = groups / width
    scaled_mean = scaled.mean(-1)
    codes, residual, size = (torch.empty_like(groups) for _ in range(3))

    def step(zero: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.add(scaled, zero.unsqueeze(-1), out=codes).round_().clamp_(0, MAX_CODE)
        torch.sub(scaled, codes, out=residual).add_(zero.unsqueeze(-1)).mul_(width)
        sizes = torch.abs(residual, out=size).sum(-1)
        shrunk = _shrink(residual, size, beta)
        # eq. 8 and 9: the zero point that is optimal for the shrunk error m, the mean of q - (w - m)/s over a group
        return sizes, codes.mean(-1) - scaled_mean + shrunk.div_(width).mean(-1)

    return step


def _shrink(residual: torch.Tensor, size: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the generalized soft threshold sign(x)·max(|x| - |x|^(p-1)/β, 0) (paper eq. 7).

    Overwrites ``size``, which holds |x|; where x is 0 the power is infinite and the result 0.
    """
    threshold = size.pow(NORM - 1).div_(beta)
    return size.sub_(threshold).clamp_(min=0).copysign_(residual)
