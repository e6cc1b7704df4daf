"""Tunes the tiles of our MoE layer for a shape on this GPU and writes a configuration file for it.

    python -m benchmarks.kernels.tune -o kernels/tuned --shape mixtral
    python -m benchmarks.kernels.tune -o out/tuned --experts 60 --top-k 4 --hidden 2048 --intermediate 1408

Every candidate is timed as in ``moe_layer.py`` (8 routings in a CUDA graph), after its result was compared with the
float32 reference; the fastest correct one is kept: first among tiles of the first GEMM, then of the second. Processes
that only compile fill Triton's cache first, since compiling takes far longer than timing.
``VLLM_MILO_TUNED_CONFIG_FOLDER`` makes a folder other than the package's own known to the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.kernels.moe_contenders import Layer, MoEShape, milo
from benchmarks.kernels.moe_layer import SHAPES, copies_needed, make_point, random_inputs
from benchmarks.kernels.random_weights import GROUP as GROUP_SIZE
from benchmarks.kernels.run import measure_point
from benchmarks.kernels.timing import Budget, Ceilings, error_text, l2_bytes, measure_ceilings
from benchmarks.processes import main_command
from benchmarks.records import environment
from vllm_milo.kernels import tuned
from vllm_milo.kernels.serving import fused_moe
from vllm_milo.kernels.serving.dispatch import THREE_TILES, TUNED_KEYS, heuristic_configs
from vllm_milo.kernels.serving.dispatch import MoEShape as LocalShape
from vllm_milo.kernels.serving.gemm.config import GemmConfig
from vllm_milo.kernels.serving.padding import padded

Configs = tuple[GemmConfig, GemmConfig]
"""The tiles of a layer's two GEMMs, gate/up first."""

TILES = [
    GemmConfig(16, 128, 1, False, 4, 3),
    GemmConfig(16, 128, 1, False, 4, 4),
    GemmConfig(16, 128, 1, False, 4, 5),
    GemmConfig(32, 128, 1, False, 4, 3),
    GemmConfig(32, 128, 1, False, 4, 4),
    GemmConfig(32, 128, 1, False, 4, 4, max_registers=THREE_TILES),
    GemmConfig(64, 128, 1, True, 4, 3, 4),
    GemmConfig(64, 128, 1, True, 4, 4, 4),
    GemmConfig(64, 128, 1, True, 4, 3, 4, max_registers=THREE_TILES),
    GemmConfig(128, 128, 1, True, 4, 3, 4),
    GemmConfig(128, 256, 1, True, 8, 3, 4),
    GemmConfig(256, 128, 1, True, 8, 3, 4),
]
"""Tiles that are tried, each with several tails and splits of K."""
SPLITS = (1, 2, 4, 8)
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
"""Close to each other, since the nearest entry of a file is used."""


class Result(NamedTuple):
    """A candidate's time, or why it has none."""

    config: Configs
    microseconds: float | None
    error: str | None


def heuristic(tokens: int, shape: MoEShape, device: torch.device) -> Configs:
    """Return the tiles that are used without a file."""
    local = LocalShape(shape.experts, shape.hidden, shape.intermediate, GROUP_SIZE, GROUP_SIZE)
    return heuristic_configs(tokens * shape.top_k, local, device)


def first_candidates(tokens: int, shape: MoEShape, device: torch.device) -> list[Configs]:
    """Return pairs of tiles that differ in the first GEMM's, the heuristic's own first.

    Tiles far larger or smaller than the mean number of pairs of an expert are left out. The second GEMM has the same
    tile, with K split as the heuristic does.
    """
    default = heuristic(tokens, shape, device)
    tried = [default]
    for tile in _tiles(_mean_load(tokens, shape)):
        for split in (1,) if tile.scaled else _splits(tokens):
            pair = (tile._replace(split_k=split), tile._replace(split_k=default[1].split_k))
            if pair not in tried:
                tried.append(pair)
    return tried


def second_candidates(tokens: int, shape: MoEShape, winner: Configs) -> list[Configs]:
    """Return the pairs that keep the winner's first tile: the second's agrees with it in block_m."""
    tiles = [tile for tile in _tiles(_mean_load(tokens, shape)) if tile.block_m == winner[0].block_m]
    pairs = [(winner[0], tile._replace(split_k=split)) for tile in tiles for split in _splits(tokens)]
    return [pair for pair in pairs if pair != winner]


def to_compile(tokens: int, shape: MoEShape, device: torch.device) -> list[Configs]:
    """Return pairs that hold every tile that may be tried, each once as far as possible."""
    firsts = first_candidates(tokens, shape, device)
    pairs = list(firsts)
    for block_m in sorted({first.block_m for first, _ in firsts}):
        same = [pair for pair in firsts if pair[0].block_m == block_m]
        seconds = [second for _, second in second_candidates(tokens, shape, same[0])]
        pairs += zip(itertools.cycle([first for first, _ in same]), seconds, strict=False)
    return pairs


def _mean_load(tokens: int, shape: MoEShape) -> float:
    return tokens * shape.top_k / min(shape.experts, tokens * shape.top_k)


def _splits(tokens: int) -> tuple[int, ...]:
    return SPLITS if tokens <= 64 else SPLITS[:2]


def _tiles(mean: float) -> list[GemmConfig]:
    tiles = [tile._replace(tail_m=tail) for tile in TILES for tail in _tails(tile)]
    fitting = [tile for tile in tiles if mean / 8 <= tile.block_m <= max(16, 3 * mean)]
    return fitting or tiles[-1:]


def _tails(tile: GemmConfig) -> tuple[int, ...]:
    if tile.block_m == 16:
        return (0,)
    return (tile.block_m // 2, tile.block_m // 4) if tile.scaled else (0, 16)


@contextlib.contextmanager
def forced(configs: Configs) -> Iterator[None]:
    """Make the layer use these tiles, whatever the number of tokens."""
    with mock.patch.object(fused_moe, "moe_configs", return_value=configs):
        yield


def best(results: Sequence[Result]) -> Result | None:
    """Return the fastest candidate; None where none is correct."""
    timed = [result for result in results if result.microseconds is not None]
    return min(timed, key=lambda result: result.microseconds or 0.0, default=None)


def measure(configs: Sequence[Configs], time_one: Callable[[], float], budget: Budget) -> Iterator[Result]:
    """Time each tile; one that does not compile, does not fit or is wrong is reported and passed over."""
    for config in configs:
        if budget.spent():
            return
        try:
            with forced(config):
                yield Result(config, time_one(), None)
        except Exception as error:  # out of shared memory, unsupported tiles, wrong results: all of interest
            yield Result(config, None, error_text(error))


class Tuner:
    """Tunes one shape.

    Args:
        shape: the layer.
        arguments: of the command line.
    """

    def __init__(self, shape: MoEShape, arguments: argparse.Namespace) -> None:
        self.shape = shape
        self.device = arguments.device
        self.seconds = arguments.point_seconds
        self.budget = Budget(arguments.seconds)
        self.ceilings: Ceilings = measure_ceilings(self.device)
        torch.manual_seed(0)
        self.layer: Layer = milo(shape, arguments.tokens, self.device, arguments.rank)
        copies = copies_needed(shape, l2_bytes(self.device))
        self.copies = [self.layer.weights, *([w.clone() for w in self.layer.weights] for _ in range(copies - 1))]

    def tune(self, tokens: int, counts_left: int) -> list[Result]:
        """Return the results of the candidates at one token count, in its share of the time that is left."""
        budget = Budget(self.budget.left() / counts_left)
        torch.manual_seed(tokens)
        point = make_point(self.shape, self.layer, self.copies, self.device, tokens)
        if point.expected is not None:
            expected = point.expected()
            point = point._replace(expected=lambda: expected)

        def time_one() -> float:
            return float(measure_point(point, self.ceilings, self.seconds, self.device)["microseconds"])

        results = list(measure(first_candidates(tokens, self.shape, self.device), time_one, budget))
        winner = best(results)
        if winner is not None:
            results += measure(second_candidates(tokens, self.shape, winner.config), time_one, budget)
        return results


def compile_part(shape: MoEShape, arguments: argparse.Namespace) -> None:
    """Compile every ``parts``-th candidate by running it once; failures show when they are timed."""
    part, parts = arguments.compile_part
    layer = milo(shape, arguments.tokens, arguments.device, arguments.rank)
    wanted = [(pair, tokens) for tokens in arguments.tokens for pair in to_compile(tokens, shape, arguments.device)]
    for config, tokens in wanted[part::parts]:
        inputs = random_inputs(shape, tokens, arguments.device)
        with forced(config), contextlib.suppress(Exception):
            layer.call(layer.weights, inputs.x[0], inputs.router[0], inputs.ids[0])


def compile_all(words: Sequence[str], parts: int, seconds: float) -> None:
    """Run ``parts`` processes that compile, and wait for them; what they do not finish is compiled later."""
    command = main_command("benchmarks.kernels.tune", *words)
    processes = [subprocess.Popen([*command, "--compile-part", f"{part}/{parts}"]) for part in range(parts)]
    budget = Budget(seconds)
    for process in processes:
        try:
            process.wait(max(0.1, budget.left()))
        except subprocess.TimeoutExpired:
            process.kill()


def as_entry(configs: Configs) -> dict[str, Any]:
    """Return tiles as an entry of a tuned file."""
    return {key: config._asdict() for key, config in zip(TUNED_KEYS, configs, strict=True)}


def write_results(folder: Path, shape: MoEShape, device: torch.device, results: Mapping[int, Sequence[Result]]) -> Path:
    """Write the configuration file of the best candidates, and all times beside it; return the file."""
    about = environment(device)
    path = folder / tuned.file_name(shape.experts, padded(shape.intermediate), about["device"])
    chosen = {tokens: winner for tokens, rows in results.items() if (winner := best(rows)) is not None}
    if chosen:
        configs = {tokens: as_entry(winner.config) for tokens, winner in chosen.items()}
        tuned.write_file(path, configs, str(about["triton"]))
    rows = {
        str(tokens): [result._asdict() | {"config": as_entry(result.config)} for result in rows]
        for tokens, rows in results.items()
    }
    log = {"environment": about, "shape": shape._asdict(), "results": rows}
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".log").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return path


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the configuration file")
    parser.add_argument("--shape", choices=list(SHAPES))
    for name in ("experts", "top-k", "hidden", "intermediate"):
        parser.add_argument(f"--{name}", type=int, help="of a shape that --shape does not know")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=TOKENS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300, help="time no new candidate after this long")
    parser.add_argument("--point-seconds", type=float, default=0.02, help="measuring time of one candidate")
    parser.add_argument("--compilers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="0: no processes")
    parser.add_argument("--compile-seconds", type=float, default=240, help="stop the compiling processes after this")
    parser.add_argument("--compile-part", type=_part, help=argparse.SUPPRESS)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(words)
    if arguments.shape is None and None in (
        arguments.experts, arguments.top_k, arguments.hidden, arguments.intermediate
    ):  # fmt: skip
        parser.error("give --shape, or all of --experts, --top-k, --hidden and --intermediate")
    return arguments


def _part(text: str) -> tuple[int, int]:
    part, parts = text.split("/")
    return int(part), int(parts)


def main(words: Sequence[str] | None = None) -> None:
    """Tune what the command line asks for; files are written after each token count."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    shape = (
        SHAPES[arguments.shape]
        if arguments.shape is not None
        else MoEShape("given", arguments.experts, arguments.top_k, arguments.hidden, arguments.intermediate)
    )
    if arguments.compile_part is not None:
        compile_part(shape, arguments)
        return
    if arguments.compilers:
        compile_all(words, arguments.compilers, arguments.compile_seconds)
    tuner = Tuner(shape, arguments)
    results: dict[int, list[Result]] = {}
    for done, tokens in enumerate(arguments.tokens):
        results[tokens] = tuner.tune(tokens, len(arguments.tokens) - done)
        path = write_results(arguments.output, shape, arguments.device, results)
        winner = best(results[tokens])
        if winner is None or winner.microseconds is None:
            print(f"{tokens} tokens: no correct candidate of {len(results[tokens])}", flush=True)
        else:
            default = results[tokens][0].microseconds
            was = "failed" if default is None else f"{default:.1f}"
            print(f"{tokens} tokens: {winner.microseconds:.1f} us (heuristic {was}), {winner.config}", flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
