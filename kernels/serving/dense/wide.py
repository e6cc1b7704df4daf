"""A dense layer that is kept in 16 bits: few tokens by a kernel that only streams the weights, more by the library.

Beside the 16 bits a layer may have the same weights in 8, a scale for 128 of an output (:mod:`.codes`). Few tokens read
those, since their time is that of the bytes; of more tokens it is not, and 16 bits are exact.

With few tokens the product is a copy of the weights past the multiprocessors, and the library's kernels take up to 1.7
times as long as memory does. Here each program has few outputs over all of K: all programs are there at once, each
keeps several steps of loads in flight, and none waits for another's parts. Its warps share each step's K, since an MMA
waits for the one before that adds to the same sums: a single warp's took longer than the bytes. More tokens want larger
blocks of both operands, and the library is quicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...launch import is_noting, launch, launch_mode, processors, shared_memory
from ...sizes import cdiv, next_power_of_2
from .codes import GROUP, SCALE_DTYPE


class WideTile(NamedTuple):
    """What a program of :func:`wide_linear` computes, and how.

    Attributes:
        outputs: of a program.
        step: values of K that a step of its loop takes, each warp its part of them: of weights in 8 bits no more than
            share a scale.
        warps: of a program.
        stages: steps whose loads are in flight.
    """

    outputs: int
    step: int
    warps: int
    stages: int

    def loads(self, tokens: int, in_codes: bool) -> int:
        """Return the bytes of shared memory that are in flight, for so many tokens, on weights in 16 bits or in 8."""
        rows = max(LEAST_ROWS, next_power_of_2(tokens))
        scales = SCALE_DTYPE.itemsize * self.outputs * self.warps if in_codes else 0
        return (self.stages - 1) * (self.step * (self.outputs * (1 if in_codes else 2) + rows * 2) + scales)


LEAST_ROWS = 8
"""Tokens of an MMA."""
TILES = {8: WideTile(16, 256, 2, 5), 16: WideTile(16, 128, 1, 6)}
"""By the largest number of tokens."""
SPREAD_TILES = {32: WideTile(16, 512, 4, 4)}
"""Likewise where a multiprocessor has fewer than :data:`FEW_PROGRAMS`, and room for them: more warps share K."""
FEW_PROGRAMS = 1.5
MOST_TOKENS = max(*TILES, *SPREAD_TILES)
"""With more the library is quicker, whatever the layer."""
CODE_TILES = (WideTile(32, 512, 4, 3), WideTile(64, 256, 4, 4))
"""For weights in 8 bits: the first one of whose programs none waits for another to end."""
SPREAD_CODE_TILES = (WideTile(16, 512, 4, 6), WideTile(32, 512, 4, 4))
"""Likewise before those, of whose programs a multiprocessor has no more than one: each has more in flight."""
FEWEST_IN_CODES = 0.5
"""Layers with fewer programs of 16 outputs for a multiprocessor have no 8 bits: their time is not that of bytes."""
MOST_IN_CODES = {0: 8, 4096: 16}
"""Tokens that read weights in 8 bits, by the least K: with more a short K does not pay for the sum over warps."""


def wide_tile(tokens: int, outputs: int, inputs: int, device: torch.device, in_codes: bool = False) -> WideTile | None:
    """Return how so many tokens are multiplied by weights in 16 bits, or in 8; None where others are quicker.

    That is also where some programs must wait for others to end, for want of shared memory.
    """

    def programs(tile: WideTile) -> float:
        return cdiv(outputs, tile.outputs) / processors(device)

    known: list[WideTile]
    room = shared_memory(device)
    spread = programs(SPREAD_TILES[32])
    if in_codes:
        most = max(most for least, most in MOST_IN_CODES.items() if least <= inputs)
        read = spread >= FEWEST_IN_CODES and tokens <= most
        known = [*(tile for tile in SPREAD_CODE_TILES if programs(tile) <= 1), *CODE_TILES] if read else []
    else:
        tiles = TILES if spread >= FEW_PROGRAMS else SPREAD_TILES
        known = [tile for most, tile in tiles.items() if tokens <= most][:1]
    return next((tile for tile in known if programs(tile) <= room // tile.loads(tokens, in_codes)), None)


@triton.jit
def _bf16_of(codes, ASM: tl.constexpr):
    """The whole numbers that :mod:`.codes` means by bytes, in bf16, exactly.

    One instruction brings two bytes below the bits of a float and one takes off what these mean. The GPU's own
    conversion from integers runs at an eighth of that speed, and would take as long as the bytes do.
    """
    if not ASM:
        floats = (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return (floats.to(tl.float32) - 320.0).to(tl.bfloat16)
    asm: tl.constexpr = (
        "{ .reg .b32 w, one, zero; mov.b32 one, 0x3F803F80; mov.b32 zero, 0xC3A0C3A0;"  # twice 1 and -320
        " prmt.b32 w, $2, 0x43434343, 0x4140; fma.rn.bf16x2 $0, w, one, zero;"
        " prmt.b32 w, $2, 0x43434343, 0x4342; fma.rn.bf16x2 $1, w, one, zero; }"
    )
    return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [codes], tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def _fp16_of(codes, ASM: tl.constexpr):
    """As :func:`_bf16_of`, in fp16."""
    if not ASM:
        return (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    asm: tl.constexpr = (
        "{ .reg .b32 w, zero; mov.b32 zero, 0x64806480;"  # twice 1152
        " prmt.b32 w, $2, 0x64646464, 0x4140; sub.f16x2 $0, w, zero;"
        " prmt.b32 w, $2, 0x64646464, 0x4342; sub.f16x2 $1, w, zero; }"
    )
    return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [codes], tl.float16, is_pure=True, pack=4)


@triton.jit(do_not_specialize=["M"])
def _wide_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, M, N, K,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of up to BLOCK_M rows: x [M, K] · w [N, K]ᵀ + bias [N]; w in 8 bits have scale [K / GROUP, N].

    Its step in :mod:`..protocol` is ``WIDE``.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # [PARTS, values of a part]: a part of each step for each warp
    first_k = tl.arange(0, PARTS)[:, None] * (BLOCK_K // PARTS)
    k = first_k + tl.arange(0, BLOCK_K // PARTS)[None, :]
    w_rows = w_ptr + n.to(tl.int64)[None, :, None] * K
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_rows = x_ptr + m[None, None, :] * K
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        here = k < (BLOCK_K if EVEN_K else K - start)
        w = tl.load(
            w_rows + (start + k)[:, None, :],
            mask=(n < N)[None, :, None] & here[:, None, :],
            other=0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_rows + (start + k)[:, :, None], mask=(m < M)[None, None, :] & here[:, :, None], other=0)
        if scale_ptr is not None:
            part = start + first_k
            scale = tl.load(scale_ptr + part // GROUP * N + n[None, :], mask=(n < N)[None, :] & (part < K), other=0)
            w = _bf16_of(w, ASM) if x.dtype == tl.bfloat16 else _fp16_of(w, ASM)
            acc += tl.dot(w, x) * scale[:, :, None]
        else:
            acc = tl.dot(w, x, acc)
    acc = tl.sum(acc, 0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    out = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def wide_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    tile: WideTile | None = None,
) -> torch.Tensor:
    """Return x·Wᵀ + bias, [.., K] -> [.., N], summed in fp32 and rounded once.

    Args:
        x: fp16 or bf16.
        weights: W [N, K] of the same dtype, contiguous; or that and W once more in 8 bits, by :func:`.codes.encode`.
        bias: [N] of the same dtype, or None.
        tile: forces the kernel, and how it runs; with weights in 8 bits it reads those.

    Raises:
        ValueError: a warp of the tile would take weights in 8 bits of more than one scale at once.
    """
    n, k = weights[0].shape
    tokens = x.numel() // k
    if tile is None and tokens > MOST_TOKENS:  # at once: in no CUDA graph the host has no time to lose
        return multiply_wide(x, weights[0], bias)
    in_codes = len(weights) > 1
    if in_codes and tile is None:
        tile = wide_tile(tokens, n, k, x.device, in_codes=True)
        in_codes = tile is not None
    tile = tile or wide_tile(tokens, n, k, x.device)
    if tokens == 0 or tile is None:
        return multiply_wide(x, weights[0], bias)
    if in_codes and GROUP % (tile.step // tile.warps):
        raise ValueError(f"{tile}: a warp's part of a step must divide the {GROUP} weights of a scale")
    read, scale = weights[1:] if in_codes else (weights[0], None)
    mode = launch_mode(x.device, few_tokens=True)
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    launch(
        _wide_kernel,
        (cdiv(n, tile.outputs),),
        mode,
        x.reshape(-1, k).contiguous(),
        read,
        scale,
        bias,
        out,
        tokens,
        n,
        k,
        EVEN_K=k % tile.step == 0,
        BLOCK_M=max(LEAST_ROWS, next_power_of_2(tokens)),
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.step,
        STAGES=tile.stages,
        PARTS=tile.warps,
        GROUP=GROUP,
        ASM=mode.asm,
        PDL=mode.early,
        num_warps=tile.warps,
    )
    return out.view(*x.shape[:-1], n)


def multiply_wide(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x·Wᵀ + bias, [.., K] and [N, K] -> [.., N], by the library; not computed where launches are only noted."""
    if is_noting():
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    return torch.nn.functional.linear(x, weight, bias)
