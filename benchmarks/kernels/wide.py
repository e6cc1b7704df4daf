"""Times dense layers kept in 16 bits, and in 8, at few tokens: our kernel's tiles against the library's product.

    python -m benchmarks.kernels.wide -o out/wide.json
    python -m benchmarks.kernels.wide -o out/wide.json --shapes mixtral-o,qwen3-o --tokens 1,16

A norm of x comes before each product, as in a model, so that a kernel which starts early follows one that does not ask
for it; the time of eight norms alone is taken off that of eight pairs. Weights are larger than L2 together. Each
product's result is compared with the library's, which has 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.linear import SHAPES as LAYERS
from benchmarks.kernels.run import point_parser, record_rows, relative_error
from benchmarks.records import markdown_table
from vllm_milo.kernels.launch import shared_memory
from vllm_milo.kernels.serving.dense.codes import encode
from vllm_milo.kernels.serving.dense.wide import (
    CODE_TILES,
    SPREAD_CODE_TILES,
    SPREAD_TILES,
    TILES,
    WideTile,
    wide_linear,
    wide_tile,
)
from vllm_milo.kernels.tuning.timing import CALLS_IN_GRAPH, time_calls

SHAPES = {name: (sum(shape.widths), shape.k) for name, shape in LAYERS.items() if name != "tiny"}
SHAPES |= {"glm-qkv": (14336, 4096), "glm-o": (4096, 12288), "tiny": (96, 64)}
SHAPES |= {"qwen3-qkv-of-2": (2560, 2048), "mixtral-qkv-of-2": (3072, 4096)}  # of two GPUs
OTHERS = (
    WideTile(16, 256, 1, 5),
    WideTile(16, 512, 2, 3),
    WideTile(16, 512, 8, 4),
    WideTile(32, 256, 2, 4),
    WideTile(32, 256, 4, 4),
    WideTile(32, 512, 4, 3),
)
"""Tiles that are timed beside those in use."""
CODE_OTHERS = (
    WideTile(16, 1024, 8, 3),
    WideTile(16, 1024, 8, 4),
    WideTile(32, 256, 2, 5),
    WideTile(32, 1024, 8, 3),
)
"""Likewise, on weights in 8 bits."""
MAX_ERROR, MAX_CODES_ERROR = 0.01, 0.02
DTYPE = torch.bfloat16
Weights = list[torch.Tensor]
Product = Callable[[torch.Tensor, Weights], torch.Tensor]


def tiles(tokens: int, device: torch.device) -> Iterator[tuple[WideTile, bool]]:
    """Yield the tiles that are timed, and whether they read 8 bits: all that fit into shared memory."""
    in_use = (*TILES.values(), *SPREAD_TILES.values())
    in_codes_in_use = (*CODE_TILES, *SPREAD_CODE_TILES)
    for known, in_codes in (((*in_use, *OTHERS), False), ((*in_codes_in_use, *CODE_OTHERS), True)):
        for tile in known:
            if tile.loads(tokens, in_codes) <= shared_memory(device):
                yield tile, in_codes


def library(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """PyTorch's product of 16 bits."""
    return torch.nn.functional.linear(x, weights[0])


def _product(x: torch.Tensor, weights: Weights, tile: WideTile, read: slice) -> torch.Tensor:
    return wide_linear(x, weights[read], None, tile)


def measure(n: int, k: int, tokens: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """Return microseconds of a product by the library and by each tile, the norm before it taken off."""
    wide = [torch.randn(n, k, dtype=DTYPE, device=device) * k**-0.5 for _ in range(CALLS_IN_GRAPH)]
    weights = [[weight, *encode(weight)] for weight in wide]
    inputs = [torch.randn(tokens, k, dtype=DTYPE, device=device) for _ in range(CALLS_IN_GRAPH)]
    gain = torch.ones(k, dtype=DTYPE, device=device)

    def call(index: int, product: Product | None) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(inputs[index], [k], gain)
        return normed if product is None else product(normed, weights[index])

    def timed(product: Product | None) -> tuple[float, torch.Tensor]:
        timing, outputs = time_calls(
            [partial(call, index, product) for index in range(CALLS_IN_GRAPH)], device, seconds
        )
        return timing.median * 1e6, outputs[0].float()

    norm, _ = timed(None)
    plain, expected = timed(library)
    row: dict[str, Any] = {"norm": norm, "library": plain - norm, "tiles": []}
    row |= {
        "chosen": wide_tile(tokens, n, k, device),
        "chosen_in_codes": wide_tile(tokens, n, k, device, in_codes=True),
    }
    for tile, in_codes in tiles(tokens, device):
        read = slice(None if in_codes else 1)
        microseconds, found = timed(partial(_product, tile=tile, read=read))
        error = relative_error(found, expected)
        if not error < (MAX_CODES_ERROR if in_codes else MAX_ERROR):
            raise ValueError(f"{tile}, in codes: {in_codes}: relative error {error:.3g} against the library")
        row["tiles"].append({"tile": tile, "in_codes": in_codes, "microseconds": microseconds - norm, "error": error})
    return row


def format_report(record: dict[str, Any]) -> str:
    """Return the table: the library, what is served without and with 8 bits, and the best tile of both."""
    rows = []
    for row in record["rows"]:
        texts, served = [f"{row['library']:.2f}"], row["library"]
        for in_codes, chosen in ((False, row["chosen"]), (True, row["chosen_in_codes"])):
            times = {tuple(one["tile"]): one["microseconds"] for one in row["tiles"] if one["in_codes"] == in_codes}
            served = served if chosen is None else times[tuple(chosen)]
            best = min(times, key=lambda tile: times[tile], default=None)
            texts += [f"{served:.2f}", "" if best is None else f"{times[best]:.2f} {best}"]
        rows.append([row["shape"], str(row["tokens"]), *texts])
    return markdown_table(["layer", "tokens", "library", "16 bits", "best tile", "8 bits", "best tile"], rows)


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; write JSON and print the table."""
    arguments = point_parser(__doc__, "--shapes", SHAPES, 0.04).parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = (
        {"shape": name, "tokens": tokens} | measure(*SHAPES[name], tokens, arguments.seconds, device)
        for name in arguments.shapes
        for tokens in arguments.tokens
    )
    record = record_rows("wide", arguments.output, device, rows)
    print(format_report(record))


if __name__ == "__main__":
    main()
