"""Weights in 8 bits beside those in 16: a whole number of a byte, with a scale for 128 of an output.

A layer that is kept in 16 bits has the precision of its 3 bits and compensators. 8 bits add to that error a percent of
the weights' own spread (:func:`error`), and few tokens read half of the bytes. With one scale an output it would be two
where rows have outliers, as those of queries and keys do.

A byte means the float of 16 bits whose low byte it is, its high byte being the same for all, less :data:`MIDDLE`. In
fp16 that gives -128 to 127. In bf16, which has a bit less, it gives -192 to -64 in steps of 1 and -64 to 190 in steps
of 2. So two instructions bring two weights to 16 bits.
"""

from __future__ import annotations

import torch

from ...sizes import cdiv

HIGH_BYTE = {torch.float16: 0x64, torch.bfloat16: 0x43}
MIDDLE = {torch.float16: 1152.0, torch.bfloat16: 320.0}
LARGEST = {torch.float16: 127.0, torch.bfloat16: 190.0}
GROUP = 128
"""Weights of an output, one after the other, that share a scale; the last of an output may be fewer."""
SCALE_DTYPE = torch.float32
"""Copies to shared memory that run ahead take no fewer bits at a time."""
MOST_ERROR = 0.02
"""Where codes are further off, relative to all weights, a layer is better off without."""
ROWS = 1024
"""Outputs at a time, so that fp32 of a whole layer is never there."""


def code_bytes(outputs: int, inputs: int) -> int:
    """Return the bytes of what :func:`encode` makes of a layer."""
    return outputs * inputs + SCALE_DTYPE.itemsize * cdiv(inputs, GROUP) * outputs


def meanings(dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Return the number that each byte means, fp32 [256] in ascending order."""
    floats = torch.arange(256, dtype=torch.int16, device=device) | HIGH_BYTE[dtype] << 8
    return floats.view(dtype).float() - MIDDLE[dtype]


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, scale): uint8 [N, K] and fp32 [K / GROUP, N]; a weight is about scale times what its byte means.

    Args:
        weight: [N, K], fp16 or bf16.
    """
    n, k = weight.shape
    known = meanings(weight.dtype, weight.device)
    between = (known[1:] + known[:-1]) / 2
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(cdiv(k, GROUP), n, dtype=SCALE_DTYPE, device=weight.device)
    for start in range(0, n, ROWS):
        groups = _grouped(weight[start : start + ROWS])
        step = groups.abs().amax(2).clamp_(min=1e-30) / LARGEST[weight.dtype]
        found = torch.bucketize(groups.div_(step[:, :, None]), between, out_int32=True)
        codes[start : start + ROWS] = found.flatten(1)[:, :k]
        scale[:, start : start + ROWS] = step.T
    return codes, scale


def decode(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights that :func:`encode` made codes of, fp32 [N, K]; ``dtype`` is what it was given."""
    groups = _grouped(meanings(dtype, codes.device)[codes.int()])
    return groups.mul_(scale.T[:, :, None]).flatten(1)[:, : codes.shape[1]]


def error(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> float:
    """Return how far codes are off, relative to all weights: norm of differences over norm; waits for the device."""
    off = total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        part = weight[rows].float()
        off = off + (decode(codes[rows], scale[:, rows], weight.dtype) - part).square_().sum(dtype=torch.float64)
        total = total + part.square_().sum(dtype=torch.float64)
    return float((off / total.clamp(min=1e-300)).sqrt())


def _grouped(weight: torch.Tensor) -> torch.Tensor:
    """Return weights [N, K] in fp32 by groups, [N, K / GROUP, GROUP], zeros after the last; a copy."""
    n, k = weight.shape
    groups = torch.zeros(n, cdiv(k, GROUP), GROUP, dtype=torch.float32, device=weight.device)
    groups.flatten(1)[:, :k] = weight
    return groups
