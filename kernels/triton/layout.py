"""The kernel layout of 3-bit matrices: what one thread of an MMA needs, next to each other.

A *unit* is 128 consecutive codes of a row, two halves of 64. It becomes 4 times 3 words: lane t of the four
lanes that share a row in an MMA's A operand gets 3 words with its 16 pairs of codes. Pair p = 8·half + 2·i + h
holds the codes k = 64·half + 16·i + 8·h + 2·t + {0, 1}, the positions of that lane in 16-wide step i. A word
holds five pairs, one code in each 16-bit half, at bits 3f and 16 + 3f for the fields f = 0..4; bits 15 and 31
of the three words are the last pair, its bit b in word b. One AND (and one shift for most) yields two 16-bit
floats: nothing straddles a word, and the K order of the activations stays as it is.

    matrix [.., N, K]  ->  int32 [.., K/128, 3, N, 4]

K is padded to 128 with codes 0 (no waste unless K is an odd multiple of 64). Scales and zero points become one
int32 a group, scale in the low half, [.., K/g, N].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..packing import unpack_codes
from ..weights import ExpertWeights

UNIT = 128

FIRST_HALF = ((0, 0), (1, 0), (2, 0), (0, 2), (1, 2), (2, 2), (0, 4), (1, 4))
"""(word, field) of pairs 0..7. Fields 0, 2 and 4 reach bit 0 of a half by shifts of 0, 6 and 12."""
SECOND_HALF = ((0, 1), (1, 1), (2, 1), (0, 3), (1, 3), (2, 3), (2, 4))
"""(word, field) of pairs 8..14, read at bit 3; pair 15 is in the spare bits."""


class KernelExperts(NamedTuple):
    """:class:`..weights.ExpertWeights` in the kernel layout.

    packed int32 [E, K/128, 3, N, 4]; scale_zero int32 [E, K/g, N]; u and u_scale as in the checkpoint; v int32
    [K/128, 3, R, 4] (3 bits) or [R, K]; v_scale fp16 [K/64, R]; rank_offsets int32 [E·P + 1].
    """

    packed: torch.Tensor
    scale_zero: torch.Tensor
    u: torch.Tensor
    u_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    rank_offsets: torch.Tensor


def repack(words: torch.Tensor) -> torch.Tensor:
    """Bring packed codes from the checkpoint layout, int32 [.., N, 3K/32], to the kernel layout."""
    codes = unpack_codes(words)
    return pack_units(torch.nn.functional.pad(codes, (0, -codes.shape[-1] % UNIT)))


def pack_units(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes [.., N, K], K a multiple of 128, into int32 [.., K/128, 3, N, 4]."""
    pairs = codes.to(torch.int32).unflatten(-1, (-1, 2, 4, 2, 4, 2))  # unit, half, i, h, t, b
    two = pairs[..., 0] | pairs[..., 1] << 16  # [.., N, unit, half, i, h, t]
    two = two.flatten(-3, -2)  # [.., N, unit, half, 2i + h, t]
    words = torch.zeros(*two.shape[:-3], 3, 4, dtype=torch.int32, device=codes.device)
    for half, places in enumerate((FIRST_HALF, SECOND_HALF)):
        for pair, (word, field) in enumerate(places):
            words[..., word, :] |= two[..., half, pair, :] << (3 * field)
    for bit in range(3):
        words[..., bit, :] |= (two[..., 1, 7, :] >> bit & 0x00010001) << 15
    return words.movedim(-4, -2).contiguous()


def unpack_units(units: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_units`: int32 [.., K/128, 3, N, 4] -> uint8 [.., N, K]."""
    words = units.movedim(-2, -4)  # [.., N, unit, 3, 4]
    two = torch.zeros(*words.shape[:-2], 2, 8, 4, dtype=torch.int32, device=units.device)
    for half, places in enumerate((FIRST_HALF, SECOND_HALF)):
        for pair, (word, field) in enumerate(places):
            two[..., half, pair, :] = words[..., word, :] >> (3 * field) & 0x00070007
    for bit in range(3):
        two[..., 1, 7, :] |= (words[..., bit, :] >> 15 & 0x00010001) << bit
    codes = torch.stack((two & 7, two >> 16 & 7), dim=-1)  # [.., N, unit, half, 2i + h, t, b]
    return codes.flatten(-5).to(torch.uint8)


def pack_scale_zero(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Join fp16 [.., N, G] scales and zero points into int32 [.., G, N], the scale in the low half."""
    return torch.stack((scale, zero), dim=-1).view(torch.int32).squeeze(-1).mT.contiguous()


def prepare_experts(weights: ExpertWeights, factor_bits: int) -> KernelExperts:
    """Bring one expert GEMM's tensors from the checkpoint layout to the kernel layout."""
    packed = torch.stack([repack(expert) for expert in weights.packed])
    v = repack(weights.v) if factor_bits == 3 and weights.v.shape[0] else weights.v
    return KernelExperts(
        packed,
        pack_scale_zero(weights.scale, weights.zero),
        weights.u,
        weights.u_scale,
        v,
        weights.v_scale.mT.contiguous(),
        weights.rank_offsets,
    )
