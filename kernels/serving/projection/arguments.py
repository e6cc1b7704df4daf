"""What the kernel of V·x is launched with: each pointer and constant, once.

Each tuple is one parameter of :func:`.kernel.project_kernel`. Its fields are tensors where the kernel is launched, and
None where a launch does not need them.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Factor(NamedTuple):
    """The compensators' V, as in :class:`..layout.KernelWeights`.

    Attributes:
        v: the codes, or the values.
        v_scale: the scales.
        rank_blocks: the first block of 16 ranks of each part of each expert, and the end of the last.
    """

    v: Any
    v_scale: Any
    rank_blocks: Any


class Result(NamedTuple):
    """Where the results go.

    Attributes:
        down: V·x in 16 bits, [num_pairs, max_rank]; without FINISH its parts, fp32 [splits, num_pairs, max_rank].
        parts: with FINISH the parts that are added to ``down``, fp32 [splits, num_pairs, max_rank]; else None.
        counters: with FINISH int32 [blocks, rank_tiles], which start at 0 and end at ``splits`` where a block is in
            use; else None.
    """

    down: Any
    parts: Any
    counters: Any


class Tile(NamedTuple):
    """The constants that the kernel is compiled for.

    Attributes:
        PARTS: parts of an expert's outputs, each with a compensator of its own.
        FACTOR_BITS: bits of V's values.
        RANKS: ranks of a program.
        BF16: whether x is bf16, else it is fp16.
        ASM: whether NVIDIA assembly is used.
        WARP_MMA: whether the device multiplies by warps alone, whatever the tile, as in :class:`..gemm.arguments.Tile`.
        LANES: whether x is read in the order of lanes, as in :class:`..gemm.arguments.Tile`.
        EVEN_K: whether K is a multiple of 128.
        HAS_MAP: whether a map says which experts are local.
        SHARED_ROWS: whether pairs share rows of x, as in :class:`..gemm.arguments.Tile`.
        BLOCKS: how pairs lie in blocks, in the words of :func:`..blocks.load_pairs`.
        BLOCK_M: pairs of a program.
        SUB_BLOCKS: so many blocks are a block of the GEMM.
        STAGES: depth of the load pipeline.
        FINISH: whether the last program of a block and a rank tile adds the parts.
        PDL: whether launches start early, see :mod:`..protocol`.
    """

    PARTS: int
    FACTOR_BITS: int
    RANKS: int
    BF16: bool
    ASM: bool
    WARP_MMA: bool
    LANES: bool
    EVEN_K: bool
    HAS_MAP: bool
    SHARED_ROWS: bool
    BLOCKS: str
    BLOCK_M: int
    SUB_BLOCKS: int
    STAGES: int
    FINISH: bool
    PDL: bool
