"""A dense layer that is kept in 16 bits: few tokens by a kernel that only streams the weights, more by the library.

With few tokens the product is a copy of the weights past the multiprocessors, and the library's kernels take up to 1.7
times as long as memory does (Mixtral's output projection on an H200: 13.7 microseconds for 8.0, 11.2 here). Here each
program is one warp with few outputs over all of K: all programs are there at once, each keeps several steps of loads in
flight, and none waits for another's parts. More tokens want larger blocks of both operands, and the library is quicker.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...launch import is_noting, launch, launch_mode, processors, shared_memory
from ...sizes import cdiv, next_power_of_2


class WideTile(NamedTuple):
    """What a program of :func:`wide_linear` computes, and how.

    Attributes:
        outputs: of a program.
        step: values of K that a step of its loop takes.
        warps: of a program.
        stages: steps whose loads are in flight.
    """

    outputs: int
    step: int
    warps: int
    stages: int


TILES = {8: WideTile(16, 256, 1, 5), 16: WideTile(16, 128, 1, 6)}
"""By the largest number of tokens."""
LEAST_RESIDENT = {8: 0.0, 16: 1.5}
"""Programs on each multiprocessor from which the kernel is quicker, by the largest number of tokens: each reads all of
x, so that with more tokens fewer programs are not enough to hide it."""


def wide_tile(tokens: int, outputs: int, device: torch.device) -> WideTile | None:
    """Return how so many tokens are multiplied; None where the library is quicker.

    That is also where some programs must wait for others to end, for want of shared memory.
    """
    most = next((most for most in TILES if tokens <= most), None)
    if most is None:
        return None
    tile = TILES[most]
    resident = cdiv(outputs, tile.outputs) / processors(device)
    loads = (tile.stages - 1) * tile.step * (tile.outputs + most) * 2
    return tile if LEAST_RESIDENT[most] <= resident <= shared_memory(device) // loads else None


@triton.jit(do_not_specialize=["M"])
def _wide_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, M, N, K,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of up to BLOCK_M rows: x [M, K] · w [N, K]ᵀ + bias [N].

    Its step in :mod:`..protocol` is ``WIDE``.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + n.to(tl.int64)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_rows = x_ptr + m[None, :] * K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        here = k < (BLOCK_K if EVEN_K else K - start)
        w = tl.load(
            w_rows + (start + k)[None, :], mask=(n < N)[:, None] & here[None, :], other=0, eviction_policy="evict_first"
        )
        x = tl.load(x_rows + (start + k)[:, None], mask=(m < M)[None, :] & here[:, None], other=0)
        acc = tl.dot(w, x, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    out = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def wide_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: WideTile | None = None
) -> torch.Tensor:
    """Return x·Wᵀ + bias, [.., K] -> [.., N], summed in fp32 and rounded once.

    Args:
        x: fp16 or bf16.
        weight: [N, K], of the same dtype, contiguous.
        bias: [N] of the same dtype, or None.
        tile: forces the kernel, and how it runs.
    """
    rows = x.reshape(-1, x.shape[-1])
    tokens, (n, k) = rows.shape[0], weight.shape
    tile = tile or wide_tile(tokens, n, x.device)
    if tokens == 0 or tile is None:
        return multiply_wide(x, weight, bias)
    mode = launch_mode(x.device, few_tokens=True)
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    launch(
        _wide_kernel,
        (cdiv(n, tile.outputs),),
        mode,
        rows.contiguous(),
        weight,
        bias,
        out,
        tokens,
        n,
        k,
        EVEN_K=k % tile.step == 0,
        BLOCK_M=max(8, next_power_of_2(tokens)),
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.step,
        STAGES=tile.stages,
        PDL=mode.early,
        num_warps=tile.warps,
    )
    return out.view(*x.shape[:-1], n)


def multiply_wide(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x·Wᵀ + bias, [.., K] and [N, K] -> [.., N], by the library; not computed where launches are only noted."""
    if is_noting():
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    return torch.nn.functional.linear(x, weight, bias)
