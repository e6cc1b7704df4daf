"""Times dense layers that are kept in 16 bits at few tokens: our kernel's tiles against the library's product.

    python -m benchmarks.kernels.wide -o out/wide.json
    python -m benchmarks.kernels.wide -o out/wide.json --shapes mixtral-o,qwen3-o --tokens 1,16

A norm of x comes before each product, as in a model, so that a kernel which starts early follows one that does not ask
for it; the time of eight norms alone is taken off that of eight pairs. Weights are larger than L2 together. Each
product's result is compared with the library's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.linear import SHAPES as LAYERS
from benchmarks.kernels.run import names, numbers
from benchmarks.records import environment, markdown_table, write_json
from vllm_milo.kernels.serving.dense.wide import TILES, WideTile, wide_linear, wide_tile
from vllm_milo.kernels.tuning.timing import CALLS_IN_GRAPH, time_calls

SHAPES = {name: (sum(shape.widths), shape.k) for name, shape in LAYERS.items() if name != "tiny"}
SHAPES |= {"glm-qkv": (14336, 4096), "glm-o": (4096, 12288), "tiny": (96, 64)}
OTHERS = (
    WideTile(16, 128, 1, 8),
    WideTile(16, 256, 2, 5),
    WideTile(16, 512, 2, 3),
    WideTile(32, 128, 2, 6),
    WideTile(32, 256, 2, 4),
    WideTile(64, 128, 4, 4),
)
"""Tiles that are timed beside those in use."""
MAX_ERROR = 0.01
DTYPE = torch.bfloat16
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def measure(n: int, k: int, tokens: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """Return microseconds of a product by the library and by each tile, the norm before it taken off."""
    weights = [torch.randn(n, k, dtype=DTYPE, device=device) * k**-0.5 for _ in range(CALLS_IN_GRAPH)]
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
    library, expected = timed(torch.nn.functional.linear)
    row: dict[str, Any] = {"norm": norm, "library": library - norm, "tiles": [], "chosen": wide_tile(tokens, n, device)}
    for tile in (*TILES.values(), *OTHERS):
        microseconds, found = timed(partial(wide_linear, bias=None, tile=tile))
        error = float((found - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            raise ValueError(f"{tile}: relative error {error:.3g} against the library")
        row["tiles"].append({"tile": tile, "microseconds": microseconds - norm, "error": error})
    return row


def format_report(record: dict[str, Any]) -> str:
    """Return the table: the library, what is served, and the best tile."""
    rows = []
    for row in record["rows"]:
        times = {tuple(one["tile"]): one["microseconds"] for one in row["tiles"]}
        best = min(times, key=lambda tile: times[tile])
        served = row["library"] if row["chosen"] is None else times[tuple(row["chosen"])]
        texts = [f"{row['library']:.2f}", f"{served:.2f}", f"{times[best]:.2f} {best}"]
        rows.append([row["shape"], str(row["tokens"]), *texts])
    return markdown_table(["layer", "tokens", "library", "served", "best tile"], rows)


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; write JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    usual = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", type=names(SHAPES), default=usual, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=numbers, default=[1, 4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=0.04, help="of one number")
    arguments = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"benchmark": "wide", "environment": environment(device), "rows": []}
    for name in arguments.shapes:
        for tokens in arguments.tokens:
            row = measure(*SHAPES[name], tokens, arguments.seconds, device)
            record["rows"].append({"shape": name, "tokens": tokens} | row)
            write_json(arguments.output, record)
    print(format_report(record))


if __name__ == "__main__":
    main()
