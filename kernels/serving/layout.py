"""The kernel layout of 3-bit matrices and of compensators: what one MMA lane needs, next to each other.

A *unit* is 128 consecutive codes of a row, two halves of 64. It becomes 4 times 3 words: lane t of the four
lanes that share a row in an MMA's A operand gets 3 words with its 16 pairs of codes. Pair p = 8·half + 2·i + h
holds the codes k = 64·half + 16·i + 8·h + 2·t + {0, 1}, the positions of that lane in 16-wide step i. A word
holds five pairs, one code in each 16-bit half, at bits 3f and 16 + 3f for the fields f = 0..4; bits 15 and 31
of the three words are the last pair, its bit b in word b. One AND (and one shift for most) yields two 16-bit
floats: nothing straddles a word, and the K order of the activations stays as it is.

Rows come in blocks, so that what a tile loads is contiguous:

    weights        [.., N, K]  ->  int32 [.., K/128, N/64, 3, 64, 4]
    V of an expert [r, K]      ->  int32 [r/16, K/128, 3, 16, 4]
    Uᵀ of an expert [N, r]     ->  int16 [r/16, N, 4], lane t's four codes k = 8·h + 2·t + b in its four nibbles

:data:`EXAMPLE` follows some codes of a unit into the bits of its words; :mod:`.gemm.dequant` takes them out again.

K is padded to 128 with codes 0 (no waste unless K is an odd multiple of 64), N of each part to 64 with rows 0, ranks of
each part to 16. :mod:`.padding` says what that asks of the activations.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..bounds import largest_row_norms
from ..packing import CODES_PER_UNIT, FACTOR_ZERO, WORDS_PER_UNIT, unpack_codes
from ..weights import RANK_BLOCK, ExpertWeights, LinearSpec, LinearWeights, factor_elements, offsets, rank_blocks
from .padding import check_factors, pad_rows, padded

UNIT = 128
ROW_BLOCK = 64

FIRST_HALF = ((0, 0), (1, 0), (2, 0), (0, 2), (1, 2), (2, 2), (0, 4), (1, 4))
"""(word, field) of pairs 0..7. Fields 0, 2 and 4 reach bit 0 of a half by shifts of 0, 6 and 12."""
SECOND_HALF = ((0, 1), (1, 1), (2, 1), (0, 3), (1, 3), (2, 3), (2, 4))
"""(word, field) of pairs 8..14, read at bit 3; pair 15 is in the spare bits."""


class Bits(NamedTuple):
    """Where a code stands in the 3 words of each of the 4 lanes of a unit.

    Attributes:
        lane: of the MMA.
        word: of the lane, for each of the code's bits, the lowest first.
        bit: of that word, likewise.
    """

    lane: int
    word: tuple[int, int, int]
    bit: tuple[int, int, int]


EXAMPLE = {
    0: Bits(lane=0, word=(0, 0, 0), bit=(0, 1, 2)),  # the first pair's first code: word 0, field 0
    1: Bits(lane=0, word=(0, 0, 0), bit=(16, 17, 18)),  # its second code, in the other half of the word
    2: Bits(lane=1, word=(0, 0, 0), bit=(0, 1, 2)),  # two codes a lane
    8: Bits(lane=0, word=(1, 1, 1), bit=(0, 1, 2)),  # h = 1: pair 1, in word 1
    16: Bits(lane=0, word=(2, 2, 2), bit=(0, 1, 2)),  # i = 1: pair 2, in word 2
    24: Bits(lane=0, word=(0, 0, 0), bit=(6, 7, 8)),  # pair 3: word 0, field 2
    56: Bits(lane=0, word=(1, 1, 1), bit=(12, 13, 14)),  # pair 7: word 1, field 4
    64: Bits(lane=0, word=(0, 0, 0), bit=(3, 4, 5)),  # the second half: pair 8 in word 0, field 1
    117: Bits(lane=2, word=(2, 2, 2), bit=(28, 29, 30)),  # pair 14: word 2, field 4
    127: Bits(lane=3, word=(0, 1, 2), bit=(31, 31, 31)),  # pair 15: one bit in each word
}
"""A worked example: where some of the 128 codes of a unit stand, each by its number k."""


class KernelWeights(NamedTuple):
    """3-bit matrices of E experts (a dense layer is one) of P parts, and their compensators.

    With R blocks of 16 ranks over all experts and parts, G = 128/group_size, Nᵢ padded to 64, N their sum, and factors
    of 3 bits (8 and 16 bits: one element a value):

    packed int32 [E, K/128, N/64, 3, 64, 4]; scale_zero int32 [E, K/128, N, G], fp16 scale times 2^exponent in the low
    half and zero point in the high half; u int16, 1-D, the parts' [rᵢ/16, Nᵢ, 4] ([rᵢ/16, Nᵢ, 16]) one after another;
    u_scale fp16, 1-D, likewise [rᵢ/16, Nᵢ/64, 16]; v int32 [R, K/128, 3, 16, 4] ([R, 16, 128·⌈K/128⌉]);
    v_scale int32 [R, ⌈K/128⌉, 16], the fp16 scales of a unit's halves in its halves, 0 in the rows and groups that
    padding added; rank_blocks int32 [E·P + 1],
    the blocks of part p of expert e; u_starts int64 [E·P], where its part of u starts, in elements of u_scale;
    norms fp32 [E·P], the largest norm of a row (:mod:`..bounds`) of experts of two parts, else empty; exponents int32
    [E], of :func:`scale_exponents`; bias fp32 [E, N], 0 in the rows that padding added, or None.
    """

    packed: torch.Tensor
    scale_zero: torch.Tensor
    u: torch.Tensor
    u_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    rank_blocks: torch.Tensor
    u_starts: torch.Tensor
    norms: torch.Tensor
    exponents: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def present(self) -> list[torch.Tensor]:
        """The tensors that there are: all but the bias of experts that have none, and of dense layers."""
        return [tensor for tensor in self if tensor is not None]

    @property
    def columns(self) -> int:
        """N, the outputs of all parts, each padded to a multiple of 64."""
        return self.scale_zero.shape[2]

    @property
    def units(self) -> int:
        """Units of 128 codes a row."""
        return self.scale_zero.shape[1]

    @property
    def group_size(self) -> int:
        """Codes along K that share a scale and a zero point."""
        return UNIT // self.scale_zero.shape[3]


def to_units(codes: torch.Tensor, rows: int) -> torch.Tensor:
    """Pack codes [.., N, K], K a multiple of 128 and N of ``rows``, into int32 [.., N/rows, K/128, 3, rows, 4]."""
    pairs = codes.to(torch.int32).unflatten(-1, (-1, 2, 4, 2, 4, 2))  # unit, half, i, h, t, b
    two = pairs[..., 0] | pairs[..., 1] << 16
    two = two.flatten(-3, -2)  # [.., N, unit, half, 2i + h, t]
    words = torch.zeros(*two.shape[:-3], 3, 4, dtype=torch.int32, device=codes.device)
    for half, places in enumerate((FIRST_HALF, SECOND_HALF)):
        for pair, (word, field) in enumerate(places):
            words[..., word, :] |= two[..., half, pair, :] << (3 * field)
    for bit in range(3):
        words[..., bit, :] |= (two[..., 1, 7, :] >> bit & 0x00010001) << 15
    return words.unflatten(-4, (-1, rows)).movedim(-4, -2)  # [.., N/rows, unit, 3, rows, 4]


def from_units(blocks: torch.Tensor) -> torch.Tensor:
    """Undo :func:`to_units`: int32 [.., N/rows, K/128, 3, rows, 4] -> uint8 [.., N, K]."""
    words = blocks.movedim(-2, -4).flatten(-5, -4)  # [.., N, unit, 3, 4]
    two = torch.zeros(*words.shape[:-2], 2, 8, 4, dtype=torch.int32, device=blocks.device)
    for half, places in enumerate((FIRST_HALF, SECOND_HALF)):
        for pair, (word, field) in enumerate(places):
            two[..., half, pair, :] = words[..., word, :] >> (3 * field) & 0x00070007
    for bit in range(3):
        two[..., 1, 7, :] |= (words[..., bit, :] >> 15 & 0x00010001) << bit
    codes = torch.stack((two & 7, two >> 16 & 7), dim=-1)  # [.., N, unit, half, 2i + h, t, b]
    return codes.flatten(-5).to(torch.uint8)


def repack_matrix(words: torch.Tensor) -> torch.Tensor:
    """Bring packed codes from the checkpoint layout, int32 [N, 3K/32], to int32 [K/128, N/64, 3, 64, 4]."""
    codes = unpack_codes(words)
    codes = pad(codes, (0, -codes.shape[-1] % UNIT))
    return to_units(codes, ROW_BLOCK).movedim(1, 0).contiguous()


def join_scale_zero(scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> torch.Tensor:
    """Join fp16 [.., N, K/g] scales and zero points into int32 [.., K/128, N, 128/g], padding with zeros."""
    words = torch.stack((scale, zero), dim=-1).view(torch.int32).squeeze(-1)
    groups = UNIT // group_size
    return pad(words, (0, -words.shape[-1] % groups)).unflatten(-1, (-1, groups)).movedim(-2, -3).contiguous()


def scale_exponents(scale: torch.Tensor) -> torch.Tensor:
    """Return the largest exponent up to 30 with which an expert's scales times 2^exponent fit in fp16, int32 [E].

    So weights in units of 2^-24 of the largest are what fp16 holds best, and codes can be multiplied as they stand in
    their words, as subnormals (:func:`.gemm.dequant.fast_operand`).

    Args:
        scale: fp16 [E, N, K/g].
    """
    _, above = torch.frexp(scale.abs().amax((1, 2)).float())  # of the power of two next above the largest
    return (16 - above).clamp(0, 30).to(torch.int32)


def raise_scales(scale: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return fp16 scales [E, N, K/g] times the experts' 2^exponent, exactly."""
    return torch.ldexp(scale.float(), exponents[:, None, None]).half()


def padded_bias(weights: ExpertWeights, widths: list[int]) -> torch.Tensor | None:
    """Return the bias in fp32 with 0 in the rows that padding adds to parts of these widths; None without one."""
    if weights.bias is None:
        return None
    return pad_rows(weights.bias.float().unsqueeze(-1), widths).squeeze(-1).contiguous()


def prepare_experts(weights: ExpertWeights, factor_bits: int) -> KernelWeights:
    """Bring one expert GEMM's tensors from the checkpoint layout to the kernel layout.

    Raises:
        ValueError: the factors are integers with a scale for 64 values, and a size is no multiple of 64.
    """
    experts, n = weights.packed.shape[:2]
    ranks = ranks_of_experts(weights)
    parts = len(ranks) // experts
    widths = [n // parts] * parts
    rows = [slice(*bound) for bound in pairwise(offsets(ranks))]
    check_factors(widths * experts, ranks, checkpoint_columns(weights.packed), factor_bits)
    scale = factor_bits != 16
    exponents = scale_exponents(weights.scale)
    scales = pad_rows(raise_scales(weights.scale, exponents), widths)
    return KernelWeights(
        _repack_experts(pad_rows(weights.packed, widths)),
        join_scale_zero(scales, pad_rows(weights.zero, widths), weights.group_size),
        *_up_factors([(weights.u[r], weights.u_scale[r] if scale else None, n // parts) for r in rows], factor_bits),
        *_down_factors(weights.v, weights.v_scale, rows, checkpoint_columns(weights.packed), factor_bits),
        *serving_tables(ranks, widths * experts, weights.packed.device),
        largest_row_norms(weights, factor_bits) if parts == 2 else weights.scale.new_empty(0).float(),
        exponents,
        padded_bias(weights, widths),
    )


def prepare_linear(weights: LinearWeights, spec: LinearSpec) -> KernelWeights:
    """Bring a dense layer's tensors from the checkpoint layout to the kernel layout: one expert.

    Raises:
        ValueError: the factors are integers with a scale for 64 values, and a size is no multiple of 64.
    """
    k = checkpoint_columns(weights.packed)
    check_factors(spec.widths, spec.ranks, k, spec.factor_bits)
    elements = [factor_elements(width, spec.factor_bits) for width in spec.widths]
    starts = offsets([rank * row for rank, row in zip(spec.ranks, elements, strict=True)])
    scale_starts = offsets([rank * (width // 64) for rank, width in zip(spec.ranks, spec.widths, strict=True)])
    bounds = offsets(spec.ranks)
    factors = []
    for part, (rank, width) in enumerate(zip(spec.ranks, spec.widths, strict=True)):
        u = weights.u[starts[part] : starts[part + 1]].view(rank, elements[part])
        scale = None
        if spec.factor_bits != 16:
            scale = weights.u_scale[scale_starts[part] : scale_starts[part + 1]].view(rank, width // 64)
        factors.append((u, scale, width))
    rows = [slice(*bound) for bound in pairwise(bounds)]
    exponents = scale_exponents(weights.scale.unsqueeze(0))
    scales = pad_rows(raise_scales(weights.scale.unsqueeze(0), exponents)[0], spec.widths)
    return KernelWeights(
        repack_matrix(pad_rows(weights.packed, spec.widths)).unsqueeze(0),
        join_scale_zero(scales, pad_rows(weights.zero, spec.widths), spec.group_size).unsqueeze(0),
        *_up_factors(factors, spec.factor_bits),
        *_down_factors(weights.v, weights.v_scale, rows, k, spec.factor_bits),
        *serving_tables(spec.ranks, spec.widths, weights.packed.device),
        weights.scale.new_empty(0).float(),
        exponents,
    )


def ranks_of_experts(weights: ExpertWeights) -> list[int]:
    """Return the ranks of all parts of all experts; waits for the device."""
    return [stop - start for start, stop in pairwise(weights.rank_offsets.tolist())]


def checkpoint_columns(packed: torch.Tensor) -> int:
    """Return K of packed codes [.., N, 3K/32]."""
    return packed.shape[-1] * CODES_PER_UNIT // WORDS_PER_UNIT


def _repack_experts(packed: torch.Tensor) -> torch.Tensor:
    """Repack expert by expert: unpacked codes take ten times the memory."""
    first = repack_matrix(packed[0])
    out = first.new_empty(packed.shape[0], *first.shape)
    out[0] = first
    for expert in range(1, packed.shape[0]):
        out[expert] = repack_matrix(packed[expert])
    return out


def _values(factor: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Return the codes or values [r, columns] of a factor, whose ``columns`` fill whole words unless r is 0."""
    if bits != 3:
        return factor
    return unpack_codes(factor) if len(factor) else factor.new_zeros(0, columns, dtype=torch.uint8)


def _pad_factor(values: torch.Tensor, multiple: int, bits: int) -> torch.Tensor:
    """Pad [r, C] to whole blocks of 16 rows, and C to a multiple, with what stands for 0."""
    missing = (0, -values.shape[1] % multiple, 0, -values.shape[0] % RANK_BLOCK)
    return pad(values, missing, value=FACTOR_ZERO if bits == 3 else 0)


def _up_factors(
    factors: list[tuple[torch.Tensor, torch.Tensor | None, int]], bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return u and u_scale of (U [r, N], its scales, N) of every part."""
    us, scales = [], []
    for u, scale, width in factors:
        blocks = _pad_factor(_values(u, width, bits), ROW_BLOCK, bits).unflatten(0, (-1, RANK_BLOCK)).mT
        us.append((_nibbles(blocks) if bits == 3 else blocks).reshape(-1))  # of [r/16, N, 16]
        groups = padded(width) // 64
        each = torch.ones(u.shape[0], groups) if scale is None or not len(scale) else scale
        each = pad(each.to(u.device, torch.float16), (0, 0, 0, -u.shape[0] % RANK_BLOCK))
        scales.append(each.unflatten(0, (-1, RANK_BLOCK)).mT.reshape(-1))
    return torch.cat(us).contiguous(), torch.cat(scales).contiguous()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [.., 16] -> int16 [.., 4]: lane t's k = 8·h + 2·t + b in nibble 2·h + b."""
    lanes = codes.to(torch.int32).unflatten(-1, (2, 4, 2))  # h, t, b
    word = lanes[..., 0, :, 0] | lanes[..., 0, :, 1] << 4 | lanes[..., 1, :, 0] << 8 | lanes[..., 1, :, 1] << 12
    return word.to(torch.int16)


def _down_factors(
    v: torch.Tensor, v_scale: torch.Tensor, rows: list[slice], k: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return v and v_scale of V [R, K], each part's rows padded to blocks of 16."""
    values = _values(v, k, bits)
    values = torch.cat([_pad_factor(values[r], 1, bits) for r in rows])
    values = pad(values, (0, -k % UNIT)).unflatten(0, (-1, RANK_BLOCK))
    units = values.shape[-1] // UNIT
    if bits == 3:
        values = to_units(values, RANK_BLOCK).squeeze(1) if values.numel() else values.new_zeros(0, dtype=torch.int32)
    halves = padded(k) // 64
    scale = torch.ones(v.shape[0], halves, device=v.device) if bits == 16 or not len(v) else v_scale
    scale = torch.cat([pad(scale[r], (0, halves % 2, 0, -(r.stop - r.start) % RANK_BLOCK)) for r in rows])
    scale = scale.to(torch.float16).view(-1, RANK_BLOCK, units, 2).contiguous().view(torch.int32).squeeze(-1)
    return values.contiguous(), scale.mT.contiguous()


def serving_tables(ranks: list[int], widths: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rank_blocks and u_starts."""
    blocks = [rank_blocks(rank) for rank in ranks]
    sizes = [count * (padded(width) // 64) * RANK_BLOCK for count, width in zip(blocks, widths, strict=True)]
    table = torch.tensor(offsets(blocks), dtype=torch.int32, device=device)
    return table, torch.tensor(offsets(sizes)[:-1], dtype=torch.int64, device=device)
