"""What the GEMM's kernel is launched with: each pointer, size and constant, once.

Each tuple but :class:`Counts` is one parameter of :func:`.kernel.gemm_kernel`. Pointers are tensors where the kernel is
launched. A pointer that a launch does not need is None, and the code that would read it is not compiled.

The parameters of the machine code are the fields in this order.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Activations(NamedTuple):
    """What the weights are multiplied with.

    Attributes:
        x: 16 bits, [num_rows, K]. Pair p reads row p // top_k.
        sums: sums of x over groups, as in :class:`..projection.launcher.Projected`.
        lanes: x once more, as there, in words of two values; None where the tile does not read it.
    """

    x: Any
    sums: Any
    lanes: Any


class Weights(NamedTuple):
    """The 3-bit weights, as in :class:`..layout.KernelWeights`.

    Attributes:
        packed: the codes.
        scale_zero: a scale and a zero point in each word.
        exponents: of the powers of two that scales hold, by expert.
    """

    packed: Any
    scale_zero: Any
    exponents: Any


class Compensators(NamedTuple):
    """The compensators' up-projection, as in :class:`..layout.KernelWeights`, and what it is applied to.

    Attributes:
        u: the factors U of all parts of all experts.
        u_scale: their scales.
        rank_blocks: the first block of 16 ranks of each part of each expert, and the end of the last.
        u_starts: where each part of each expert starts in ``u``, in elements of ``u_scale``.
        down: V·x, as in :class:`..projection.launcher.Projected`; None where no expert has a compensator.
    """

    u: Any
    u_scale: Any
    rank_blocks: Any
    u_starts: Any
    down: Any


class RowScales(NamedTuple):
    """What is known of the size of rows.

    Attributes:
        row_scale: fp32 [num_rows], x holds the rows of the activations divided by it; None for 1.
        norms: fp32 [num_rows], Euclidean norms of the rows of the activations; None without an activation function.
        largest: fp32 [E·P], the largest norm of a row of the weights; None without an activation function.
    """

    row_scale: Any
    norms: Any
    largest: Any


class Output(NamedTuple):
    """Where the results go.

    Attributes:
        y: [SPLIT_K, num_pairs, N]; with an activation function fp16 [num_pairs, N / 2], of rows divided by ``scale``.
        scale: fp32 [num_pairs]; None without an activation function.
    """

    y: Any
    scale: Any


class Shape(NamedTuple):
    """The sizes of the weights.

    Attributes:
        N: outputs of all parts.
        K: inputs.
        n0: outputs of the first part. No tile holds outputs of two parts.
        n1: outputs of the second part; 0 where there is none.
        n2: outputs of the third part, likewise.
        n3: outputs of the fourth part, likewise.
    """

    N: Any
    K: Any
    n0: Any
    n1: Any
    n2: Any
    n3: Any


class Counts(NamedTuple):
    """The sizes of the activations, which change from call to call.

    They are parameters by themselves, and the kernel joins them: Triton would compile it anew for multiples of 16 and
    for 1 inside of a tuple.

    Attributes:
        num_pairs: pairs of a token and an expert; rows of a dense layer.
        num_rows: rows of x.
        top_k: pairs that share a row of x.
        max_rank: ranks of a row of V·x.
    """

    num_pairs: Any
    num_rows: Any
    top_k: Any
    max_rank: Any


class Tile(NamedTuple):
    """The constants that the kernel is compiled for.

    Attributes:
        PARTS: parts of the outputs.
        GROUP: group size.
        FACTOR_BITS: bits of U's values.
        HAS_RANK: whether any expert has a compensator.
        DOWN_SPLITS: parts of V·x that a tile adds.
        BF16: whether x is bf16, else it is fp16.
        ASM: whether NVIDIA assembly is used.
        HAS_MAP: whether a map says which experts are local.
        SHARED_ROWS: whether pairs share rows of x, top_k of them each.
        BLOCKS: how pairs lie in blocks, in the words of :func:`..blocks.load_pairs`.
        SCALE: what is scaled: "products", "weights" or "fast" (weights in fp16), see :mod:`.dequant`.
        WARP_MMA: whether the device multiplies by warps alone, whatever the tile; see :func:`.dequant.operand_order`.
        LANES: whether x is read in the order of lanes.
        EVEN_N: whether every part's outputs fill whole tiles.
        EVEN_K: whether K is a multiple of 128.
        HAS_ROW_SCALE: whether there is a ``row_scale``.
        BLOCK_M: pairs of a tile.
        BLOCK_N: outputs of a tile.
        TAIL_M: a block with at most so many pairs, an expert's last, runs as a tile of that size; 0 for none.
        JOIN: whether such a block runs in one tile with the expert's block before it, where there is one.
        SPLIT_K: parts of K that are computed apart.
        STAGES: depth of the load pipeline.
        GROUP_BLOCKS: neighbouring blocks that go through the tiles together and share the weights in the cache.
        RANK_STEP: ranks that the up-projection takes at a time.
        ACTIVATION: the activation function of gate and up, of which a tile then takes both; "" for none.
        PDL: whether launches start early, see :mod:`..protocol`.
    """

    PARTS: int
    GROUP: int
    FACTOR_BITS: int
    HAS_RANK: bool
    DOWN_SPLITS: int
    BF16: bool
    ASM: bool
    HAS_MAP: bool
    SHARED_ROWS: bool
    BLOCKS: str
    SCALE: str
    WARP_MMA: bool
    LANES: bool
    EVEN_N: bool
    EVEN_K: bool
    HAS_ROW_SCALE: bool
    BLOCK_M: int
    BLOCK_N: int
    TAIL_M: int
    JOIN: bool
    SPLIT_K: int
    STAGES: int
    GROUP_BLOCKS: int
    RANK_STEP: int
    ACTIVATION: str
    PDL: bool
