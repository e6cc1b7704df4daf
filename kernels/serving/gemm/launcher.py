"""Launches the GEMM, alone or with the activation function in its epilogue."""

from __future__ import annotations

import torch

from ...launch import LaunchMode, launch
from ...sizes import cdiv
from ..blocks import block_kind, make_blocks
from ..layout import KernelWeights
from ..padding import MULTIPLE
from ..projection.launcher import Projected
from ..routing import Routes, TokenBlocks
from .arguments import Activations, Compensators, Output, RowScales, Shape, Tile, Weights
from .config import GemmConfig, rank_step
from .kernel import gemm_kernel

MAX_PARTS = 4


def gemm(
    source: Projected,
    weights: KernelWeights,
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
    mode: LaunchMode,
    dtype: torch.dtype,
    widths: list[int],
) -> torch.Tensor:
    """Launch the GEMM.

    Args:
        source: activations, fp16 or bf16 [rows, K], contiguous, with their sums and V·x; K a multiple of 64; pair p
            reads row p // top_k.
        weights: the experts, or the dense layer, in the kernel layout.
        blocks: the pairs in blocks of ``config.block_m``.
        routes: where the pairs go; None for a dense layer, whose pairs are its rows.
        top_k: pairs that share a row of x.
        group_size: 32, 64 or 128.
        factor_bits: 3, 8 or 16.
        config: the tile.
        mode: how to launch.
        dtype: of the result: that of the activations, which x may hold in another (``source.row_scale``).
        widths: outputs of each part, at most four, multiples of 64.

    Returns:
        [split_k, pairs, N]: ``dtype`` if split_k is 1, else fp32 partial sums. Rows of pairs whose
        expert is not local are not written.

    Raises:
        ValueError: shapes, dtypes or the tile do not fit.
    """
    pairs = source.x.shape[0] if routes is None else routes.num_pairs
    out_dtype = dtype if config.split_k == 1 else torch.float32
    out = torch.empty(config.split_k, pairs, weights.columns, dtype=out_dtype, device=source.x.device)
    tiles = sum(cdiv(width, config.block_n) for width in widths)
    _launch(
        source, weights, widths, blocks, routes, top_k, group_size, factor_bits, config, mode, tiles, Output(out, None)
    )
    return out


def gemm_gated(
    source: Projected,
    weights: KernelWeights,
    blocks: TokenBlocks,
    routes: Routes,
    top_k: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
    mode: LaunchMode,
    activation: str,
) -> Projected:
    """Return act(gate)·up of every pair, fp16 [pairs, I], rows divided by ``row_scale``; arguments as in :func:`gemm`.

    ``source`` must be fp16 with ``row_scale`` and ``norm``, and the tile must not split K.

    Raises:
        ValueError: shapes, dtypes or the tile do not fit.
    """
    if config.split_k != 1 or source.row_scale is None or source.norm is None:
        raise ValueError("the activation needs whole sums of fp16 rows with their scales and norms")
    half, device = weights.columns // 2, source.x.device
    if half % (config.block_n // 2):  # a tile takes both parts of half as many columns, and all of them
        config = config._replace(block_n=128)
    out = torch.empty(routes.num_pairs, half, dtype=torch.float16, device=device)
    scale = torch.empty(routes.num_pairs, dtype=torch.float32, device=device)
    tiles = half // (config.block_n // 2)
    common = (group_size, factor_bits, config, mode, tiles, Output(out, scale))
    _launch(source, weights, [half, half], blocks, routes, top_k, *common, activation)
    return Projected(out, source.sums, None, scale)


def _launch(
    source: Projected,
    weights: KernelWeights,
    widths: list[int],
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
    mode: LaunchMode,
    tiles: int,
    output: Output,
    activation: str = "",
) -> None:
    x = source.x
    rows, k = x.shape
    _check(x, weights, widths, blocks, group_size, config)
    tile = _make_tile(source, widths, blocks, routes, top_k, group_size, factor_bits, config, mode, output, activation)
    max_rank = 0 if source.down is None else source.down.shape[2]
    widths = [*widths, *[0] * (MAX_PARTS - len(widths))]
    launch(
        gemm_kernel,
        (tiles * blocks.max_blocks, config.split_k),
        mode,
        Activations(x, source.sums, None if source.lanes is None else source.lanes.view(torch.int32)),
        Weights(weights.packed, weights.scale_zero, weights.exponents),
        Compensators(weights.u, weights.u_scale, weights.rank_blocks, weights.u_starts, source.down),
        RowScales(source.row_scale, *((source.norm, weights.norms) if output.scale is not None else (None, None))),
        output,
        make_blocks(blocks, routes),
        Shape(weights.columns, k, *widths),
        rows if routes is None else routes.num_pairs,
        rows,
        top_k,
        max_rank,
        blocks.max_blocks,
        TILE=tile,
        num_warps=config.num_warps,
        maxnreg=config.register_cap,
    )


def _make_tile(
    source: Projected,
    widths: list[int],
    blocks: TokenBlocks,
    routes: Routes | None,
    top_k: int,
    group_size: int,
    factor_bits: int,
    config: GemmConfig,
    mode: LaunchMode,
    output: Output,
    activation: str,
) -> Tile:
    """Return the constants of a launch."""
    scale = "products"
    if activation and source.row_scale is not None:
        scale = "fast"
    elif config.scales_weights(group_size):
        scale = "weights" if source.row_scale is None else "fast"
    max_rank = 0 if source.down is None else source.down.shape[2]
    kind = block_kind(blocks, routes)
    has_tails = config.tail_m < config.block_m and kind != "single"  # blocks of one pair have no last pairs
    return Tile(
        PARTS=len(widths),
        GROUP=group_size,
        FACTOR_BITS=factor_bits,
        HAS_RANK=source.down is not None,
        DOWN_SPLITS=1 if source.down is None else source.down.shape[0],
        BF16=source.x.dtype == torch.bfloat16,
        ASM=mode.asm,
        HAS_MAP=routes is not None and routes.expert_map is not None,
        SHARED_ROWS=top_k > 1,
        BLOCKS=kind,
        SCALE=scale,
        WARP_MMA=mode.warps,
        LANES=source.lanes is not None,
        EVEN_N=bool(activation) or all(width % config.block_n == 0 for width in widths),
        EVEN_K=source.x.shape[1] % 128 == 0,
        HAS_ROW_SCALE=source.row_scale is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL_M=config.tail_m if has_tails else 0,
        JOIN=config.joined and has_tails and scale != "products",
        SPLIT_K=config.split_k,
        STAGES=config.num_stages,
        GROUP_BLOCKS=config.group_blocks,
        RANK_STEP=rank_step(max_rank, len(widths)),
        ACTIVATION=activation,
        PDL=mode.early,
    )


def _check(
    x: torch.Tensor,
    weights: KernelWeights,
    widths: list[int],
    blocks: TokenBlocks,
    group_size: int,
    config: GemmConfig,
) -> None:
    k = x.shape[1]
    if x.dtype not in (torch.float16, torch.bfloat16) or not x.is_contiguous():
        raise ValueError(f"x must be contiguous fp16 or bf16, found {x.dtype} with strides {x.stride()}")
    if weights.units != cdiv(k, 128) or k % group_size:
        raise ValueError(
            f"weights have {weights.units} units of 128 inputs in groups of {group_size}, but x {k} columns"
        )
    if sum(widths) != weights.columns or not 1 <= len(widths) <= MAX_PARTS:
        raise ValueError(
            f"parts of {widths} outputs (at most {MAX_PARTS} parts), but the weights have {weights.columns}"
        )
    if k % MULTIPLE or any(width % MULTIPLE for width in widths):
        raise ValueError(
            f"found {k} inputs and parts of {widths} outputs, no multiples of {MULTIPLE}; pad both (serving/padding.py)"
        )
    if config.block_n % 64:
        raise ValueError(f"block_n must be a multiple of 64, found {config.block_n}")
    if blocks.block_m != config.block_m:
        raise ValueError(f"pairs are in blocks of {blocks.block_m}, the tile has {config.block_m}")
