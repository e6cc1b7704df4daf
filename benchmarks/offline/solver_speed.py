"""Times the solver on the matrices of one Mixtral-8x7B layer and extrapolates to all 32.

    python -m benchmarks.offline.solver_speed -o OUT.json --method milo

A layer is 8 experts of w1, w3 [14336, 4096] and w2 [4096, 14336], q and o [4096, 4096], k and v [1024, 4096]. Weights
are random, as the solver's time does not depend on them except through its stop rule; the rounds that it took are
in the results. Method ``milo`` runs as without a calibration, on HQQ's base; setting ``fast`` has the ranks by role of
the preset of that name. ``--scale 16`` divides all sizes, to check the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.records import device_name
from vllm_milo.offline.batches import batches
from vllm_milo.offline.calibration.layer_moments import NoMoments
from vllm_milo.offline.nouns import PLAIN_METHODS, Kind, LoadedMatrix, Matrix, Recipe
from vllm_milo.offline.ranks.roles import share_budget
from vllm_milo.offline.solve.methods import quantize_matrices

LAYERS = 32
HIDDEN, INNER, VALUES = 4096, 14336, 1024
EXPERTS = 8
SOURCE_STD = 0.02


class Setting(NamedTuple):
    """A row: the ranks of dense and routed matrices, or a budget of bits that is shared by role."""

    name: str
    dense: int = 0
    sparse: int = 0
    budget_bits: float | None = None
    group_size: int = 64


SETTINGS = (
    Setting("hqq"),
    Setting("s1", 512, 16),
    Setting("s2", 1024, 32),
    Setting("uniform", 64, 64),
    Setting("fast", budget_bits=3.6, group_size=128),
)


def main() -> None:
    """Time all settings and write them."""
    arguments = _parser().parse_args()
    rows = []
    for setting in SETTINGS:
        if setting.name not in arguments.settings:
            continue
        recipe = Recipe(
            method="hqq" if setting.name == "hqq" else arguments.method,
            group_size=setting.group_size,
            max_rounds=arguments.rounds,
            base="hqq",
        )
        warm_up(recipe, arguments.device)
        times = [time_layer(setting, recipe, arguments.scale, arguments.device) for _ in range(arguments.repeats)]
        rows.append(sorted(times, key=lambda row: row["layer_seconds"])[len(times) // 2])
        print(json.dumps(rows[-1]), flush=True)
        record = {"device": device_name(arguments.device), "torch": torch.__version__}
        record |= {"scale": arguments.scale, "repeats": arguments.repeats}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


def time_layer(setting: Setting, recipe: Recipe, scale: int, device: str) -> dict[str, Any]:
    """Return seconds of one layer by part and of all layers, rounds, errors, and the peak of device memory."""
    loaded = list(random_layer(scale, device))
    ranks = _ranks(setting, recipe, [matrix for matrix, _ in loaded], scale)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    parts: dict[str, dict[str, Any]] = defaultdict(lambda: {"seconds": 0.0, "ranks": [], "rounds": [], "errors": []})
    for batch in batches(loaded, NoMoments(), ranks, mixed=recipe.method == "milo"):
        theirs = [ranks[matrix.name] for matrix in batch.matrices]
        rank = theirs[0] if len(set(theirs)) == 1 else theirs
        result = quantize_matrices(batch.weights, rank, recipe, torch.bfloat16, batch.moments)
        part = parts[_part(batch.matrices)]
        part["seconds"] += clock.lap()
        part["ranks"] += theirs
        part["rounds"] += result.rounds.tolist()
        part["errors"] += result.errors.tolist()
        del result
        clock.lap()
    layer = sum(part["seconds"] for part in parts.values())
    row: dict[str, Any] = {"setting": setting.name, "method": recipe.method, "rounds": recipe.max_rounds}
    row["parts"] = {
        name: {"seconds": part["seconds"]} | {key: _mean(part[key]) for key in ("ranks", "rounds", "errors")}
        for name, part in parts.items()
    }
    row |= {"layer_seconds": layer, "model_seconds": layer * LAYERS, "layers": LAYERS}
    if device.startswith("cuda"):
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def warm_up(recipe: Recipe, device: str) -> None:
    """Let libraries load and pick kernels outside the timing."""
    rank = 0 if recipe.method in PLAIN_METHODS else 8
    weights = torch.randn(2, 256, 256, device=device)
    quantize_matrices(weights, rank, replace(recipe, max_rounds=1), torch.bfloat16)


def random_layer(scale: int, device: str) -> Iterator[LoadedMatrix]:
    """Yield the matrices of one layer with random weights."""
    generator = torch.Generator(device).manual_seed(0)
    for matrix in _layer(scale):
        weights = torch.randn(matrix.n, matrix.k, generator=generator, device=device).mul_(SOURCE_STD)
        yield matrix, weights


class Clock:
    """Seconds between laps, with all work of the device done."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._last = 0.0
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds


def _layer(scale: int) -> Iterator[Matrix]:
    hidden, inner, values = HIDDEN // scale, INNER // scale, VALUES // scale
    for leaf, rows in (("q_proj", hidden), ("k_proj", values), ("v_proj", values), ("o_proj", hidden)):
        yield Matrix(f"model.layers.0.self_attn.{leaf}", Kind.ATTENTION, rows, hidden)
    experts = "model.layers.0.block_sparse_moe.experts"
    for expert in range(EXPERTS):
        for leaf, n, k in (("w1", inner, hidden), ("w3", inner, hidden), ("w2", hidden, inner)):
            yield Matrix(f"{experts}.{expert}.{leaf}", Kind.ROUTED_EXPERT, n, k, experts, expert)


def _ranks(setting: Setting, recipe: Recipe, matrices: Sequence[Matrix], scale: int) -> Mapping[str, int]:
    if setting.budget_bits is not None:
        return share_budget(matrices, setting.budget_bits, recipe)[0]
    dense, sparse = (rank // scale // 8 * 8 for rank in (setting.dense, setting.sparse))
    return {m.name: sparse if m.kind is Kind.ROUTED_EXPERT else dense for m in matrices}


def _part(matrices: Sequence[Matrix]) -> str:
    return ", ".join(sorted({matrix.name.rpartition(".")[2] for matrix in matrices}))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    parser.add_argument("--method", choices=["milo", "paper"], default="milo")
    parser.add_argument("--settings", nargs="+", choices=[s.name for s in SETTINGS], default=["hqq", "s1", "fast"])
    parser.add_argument("--scale", type=int, choices=[1, 2, 4, 8, 16], default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
