"""Times the solver on the matrices of one Mixtral-8x7B layer and extrapolates to all 32.

    python benchmarks/solver_speed.py -o OUT.json

A layer is 8 experts of w1, w3 [14336, 4096] and w2 [4096, 14336], q and o [4096, 4096], k and v [1024, 4096]. Weights
are random, as the solver's time does not depend on them except through its stop rule; the rounds that it took are
in the results. ``--scale 16`` divides all sizes, to check the script on a CPU.

What a round of ``milo`` costs, by count. Matrix products: six, 12·N·K·r FLOPs a matrix, so 90 GFLOP for
[8, 14336, 4096] at rank 16 (two to find the space, three to fit the stored factors to each other, one to subtract
them) and 103 GFLOP for [1, 4096, 4096] at rank 512. Everything else is bound by memory: about 63 reads or writes of W
in float32, 32 of them in the base's two regressions. A beginning costs 201, and a matrix takes 14 rounds' work for 10
if one of its two beginnings wins early, 22 if they stay close: 1,350 to 1,850 reads or writes in all. W, its rests,
the work space and the codes take about eight times W in float32 at the peak: 14 GiB for [8, 14336, 4096].
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accuracy_run import device_name

from vllm_milo.offline.milo import Recipe, quantize_matrices
from vllm_milo.offline.planning import BATCH_ELEMENTS

LAYERS = 32
SOURCE_STD = 0.02


class Part(NamedTuple):
    """Matrices [n, k] of a layer that the converter quantizes together, and whether they are routed experts."""

    name: str
    matrices: int
    n: int
    k: int
    routed: bool


MIXTRAL = (
    Part("w1, w3", 16, 14336, 4096, True),
    Part("w2", 8, 4096, 14336, True),
    Part("q, o", 2, 4096, 4096, False),
    Part("k, v", 2, 1024, 4096, False),
)


class Setting(NamedTuple):
    """A row: the ranks of dense and routed matrices and the method."""

    name: str
    dense: int
    sparse: int


SETTINGS = (Setting("hqq", 0, 0), Setting("s1", 512, 16), Setting("s2", 1024, 32), Setting("uniform", 64, 64))


def main() -> None:
    """Time all settings and write them."""
    arguments = _parser().parse_args()
    rows = []
    for setting in SETTINGS:
        if setting.name not in arguments.settings:
            continue
        recipe = Recipe(method="hqq" if setting.name == "hqq" else arguments.method, max_rounds=arguments.rounds)
        rows.append(time_layer(setting, recipe, arguments.scale, arguments.device))
        print(json.dumps(rows[-1]), flush=True)
        record = {"device": device_name(arguments.device), "torch": torch.__version__, "scale": arguments.scale}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


def time_layer(setting: Setting, recipe: Recipe, scale: int, device: str) -> dict[str, Any]:
    """Return seconds of one layer by part and of all layers, rounds, errors, and the peak of device memory."""
    warm_up(recipe, device)
    parts = {}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    for part in MIXTRAL:
        rank = (setting.sparse if part.routed else setting.dense) // scale // 8 * 8
        seconds, rounds, errors = 0.0, [], []
        for weights in _batches(part, scale, device):
            _synchronize(device)
            start = time.monotonic()
            result = quantize_matrices(weights, rank, recipe, torch.bfloat16)
            _synchronize(device)
            seconds += time.monotonic() - start
            rounds += result.rounds.tolist()
            errors += result.errors.tolist()
            del result
        parts[part.name] = {"seconds": seconds, "rank": rank, "rounds": _mean(rounds), "error": _mean(errors)}
    layer = sum(part["seconds"] for part in parts.values())
    row = {"setting": setting.name, "method": recipe.method, "rounds": recipe.max_rounds, "parts": parts}
    row |= {"layer_seconds": layer, "model_seconds": layer * LAYERS, "layers": LAYERS}
    if device.startswith("cuda"):
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def warm_up(recipe: Recipe, device: str) -> None:
    """Let libraries load and pick kernels outside the timing."""
    quantize_matrices(torch.randn(2, 128, 128, device=device), 8, replace(recipe, max_rounds=1), torch.bfloat16)


def _batches(part: Part, scale: int, device: str) -> Iterator[torch.Tensor]:
    """Yield the part's matrices in the converter's batches."""
    n, k = part.n // scale, part.k // scale
    size = max(1, BATCH_ELEMENTS.get(torch.device(device).type, 2**26) // (n * k))
    generator = torch.Generator(device).manual_seed(0)
    for start in range(0, part.matrices, size):
        count = min(size, part.matrices - start)
        yield torch.randn(count, n, k, generator=generator, device=device).mul_(SOURCE_STD)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--method", default="paper")
    parser.add_argument("--settings", nargs="+", choices=[s.name for s in SETTINGS], default=["hqq", "s1", "s2"])
    parser.add_argument("--scale", type=int, choices=[1, 2, 4, 8, 16], default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
