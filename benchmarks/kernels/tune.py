"""Tunes tiles for the experts of well-known models on this GPU, and says how far from them the heuristic is.

    python -m benchmarks.kernels.tune mixtral qwen3 -o kernels/tuned --minutes 4 --record out/tuning.json
    python -m benchmarks.kernels.tune mixtral qwen3 -o kernels/tuned --minutes 4 --preset fast
    python -m benchmarks.kernels.tune olmoe qwen2-57b --minutes 2 --record out/unseen.json
    python -m benchmarks.kernels.tune --replay out/unseen.json

The minutes are for all models together. Ranks and groups are those that a preset (``balanced`` if none is named) plans
from the models' headers (``named_models.py``). The record holds, for each number of tokens, every candidate's time or
error, the heuristic's first. Without ``-o`` no file of tiles is written. ``--replay`` needs no GPU: it prints how far
from the record's best tiles today's heuristic is, where the record has the times of its choice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.named_models import MODELS, named_shape
from benchmarks.kernels.run import numbers
from benchmarks.records import environment, write_json
from vllm_milo.command.expert_layers import PLANNED
from vllm_milo.command.tune import describe
from vllm_milo.kernels import launch, tuned
from vllm_milo.kernels.serving.gemm import heuristic
from vllm_milo.kernels.tuned import Tiles, make_key
from vllm_milo.kernels.tuning.search import Result, best
from vllm_milo.kernels.tuning.tune import TOKENS, Results, chosen, tune
from vllm_milo.kernels.weights import MoEShape
from vllm_milo.offline.presets import DEFAULT_PRESET

LEAST_SECONDS = 20.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def distances(results: Results) -> dict[int, float]:
    """Return by how much longer than the best tiles the heuristic's take, by number of tokens; 0.1 for 10 %.

    Numbers of tokens at which one of the two has no time are left out.
    """
    found = {}
    for tokens, rows in results.items():
        times = [row.microseconds for row in rows if row.microseconds is not None]
        if rows and rows[0].microseconds is not None:
            found[tokens] = rows[0].microseconds / min(times) - 1
    return found


def summary(name: str, found: Mapping[int, float]) -> str:
    """Return a line on the heuristic's distances."""
    if not found:
        return f"{name}: the heuristic's tiles have no times"
    worst = max(found, key=lambda tokens: found[tokens])
    return (
        f"{name}: the heuristic takes {statistics.mean(found.values()):.1%} longer than the best tiles on average of "
        f"{len(found)} numbers of tokens, {found[worst]:.1%} at worst, at {worst} tokens"
    )


def as_entry(tiles: Tiles) -> dict[str, Any]:
    """Return tiles as JSON."""
    return {gemm: tile._asdict() for gemm, tile in zip(tuned.GEMMS, tiles, strict=True)}


def as_record(shape: MoEShape, results: Results, seconds: float) -> dict[str, Any]:
    """Return the results of a model as JSON."""
    rows = {
        str(tokens): {
            "heuristic_microseconds": rows[0].microseconds,
            "tuned_microseconds": None if (winner := best(rows)) is None else winner.microseconds,
            "candidates": [row._asdict() | {"tiles": as_entry(row.tiles)} for row in rows],
        }
        for tokens, rows in results.items()
    }
    return {"shape": shape._asdict(), "seconds": seconds, "tokens": rows}


def read_record(record: Mapping[str, Any]) -> tuple[MoEShape, dict[int, list[Result]]]:
    """Return the shape and the results of a model from JSON."""
    held = record["shape"]
    shape = MoEShape(**held | {key: tuple(held[key]) for key in ("groups", "ranks")})
    results = {
        int(tokens): [
            Result(tuned.read_tiles(one["tiles"]), one["microseconds"], one["error"]) for one in rows["candidates"]
        ]
        for tokens, rows in record["tokens"].items()
    }
    return shape, results


def replay(record: Mapping[str, Any]) -> list[str]:
    """Return lines on today's heuristic by the times of a record, for the device of the record."""
    about, lines = record["environment"], []
    device = torch.device("cpu")
    with (
        mock.patch.object(heuristic, "processors", return_value=about["multiprocessors"]),
        mock.patch.object(heuristic, "shared_memory", return_value=about["shared_memory"]),
        mock.patch.object(heuristic, "bandwidth", return_value=about["bandwidth"]),
    ):
        for name, held in record["models"].items():
            shape, results = read_record(held)
            found, unknown = {}, []
            for tokens, rows in results.items():
                times = {row.tiles: row.microseconds for row in rows if row.microseconds is not None}
                choice = heuristic.heuristic_configs(tokens * shape.top_k, shape, device)
                if choice in times:
                    found[tokens] = times[choice] / min(times.values()) - 1
                else:
                    unknown.append(str(tokens))
            lines.append(summary(name, found))
            lines += [f"  {tokens} tokens: {distance:+.1%}" for tokens, distance in found.items()]
            lines += [f"  not timed: {', '.join(unknown)} tokens"] if unknown else []
    return lines


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}")
    parser.add_argument("-o", "--output", type=Path, help="folder of the files of tiles")
    parser.add_argument("--record", type=Path, help="JSON of all candidates' times")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--minutes", type=float, default=5.0, help="for all models together")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--preset", choices=PLANNED, default=DEFAULT_PRESET, help=f"default: {DEFAULT_PRESET}")
    parser.add_argument("--tokens", type=numbers, default=list(TOKENS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--replay", type=Path, help="a record; nothing is timed")
    arguments = parser.parse_args(words)
    if unknown := [name for name in arguments.models if name not in MODELS]:
        parser.error(f"unknown {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    if bool(arguments.models) == bool(arguments.replay):
        parser.error("give names of models, or --replay RECORD")
    return arguments


def about(device: torch.device) -> dict[str, Any]:
    """Return what the heuristic knows of a device, beside its name and versions."""
    return environment(device) | {
        "multiprocessors": launch.processors(device),
        "shared_memory": launch.shared_memory(device),
        "bandwidth": launch.bandwidth(device),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Tune what the command line asks for; files are written after each model."""
    arguments = parse(sys.argv[1:] if words is None else words)
    if arguments.replay is not None:
        print("\n".join(replay(json.loads(arguments.replay.read_text(encoding="utf-8")))))
        return
    end = time.monotonic() + 60 * arguments.minutes
    shapes = {name: named_shape(name, arguments.tensor_parallel, arguments.preset) for name in arguments.models}
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    found = about(device)
    record: dict[str, Any] = {"environment": found, "dtype": arguments.dtype, "models": {}}
    for place, (name, shape) in enumerate(shapes.items()):
        start = time.monotonic()
        seconds = max(LEAST_SECONDS, (end - start) / (len(shapes) - place))
        print(f"{MODELS[name].title}: {describe(shape)}; {seconds:.0f} s", flush=True)
        results = tune(shape, device, seconds, dtype, arguments.tokens, lambda line: print(f"  {line}", flush=True))
        print(summary(name, distances(results)), flush=True)
        record["models"][name] = as_record(shape, results, time.monotonic() - start)
        if arguments.record is not None:
            write_json(arguments.record, record)
        if arguments.output is not None:
            path = arguments.output / make_key(shape, found["device"], dtype).file_name
            tuned.write_file(path, chosen(results, shape, device), str(found["triton"]))
            print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main()
