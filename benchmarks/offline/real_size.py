"""Wall clock and memory of ``milo quantize`` on layers of real size.

    python -m benchmarks.offline.real_size mixtral qwen3 --tokenizer FOLDER --folder SCRATCH -o OUT.json [--layers 2]

Writes a model of a few layers with random weights in the shapes of Mixtral-8x7B or Qwen3-30B-A3B, in shards of a layer
as the originals have them, and converts it by the command with the presets ``balanced`` and ``fast``. What a layer
takes is the difference between conversions of ``--layers`` and of one layer less, so that imports, the embedding and
the head do not count as layers; the whole model is extrapolated from it. FOLDER holds a tokenizer: only its ids are
used. Random weights route evenly, which is the most work for experts; they say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.offline.random_model import LAYERS, add_model_arguments, write_model
from benchmarks.records import environment, markdown_table, write_json

PRESETS = ("balanced", "fast")


def main() -> None:
    """Write and convert the models, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for preset in arguments.presets:
            rows.append(measure(name, preset, arguments))
            write_json(arguments.output, {"environment": environment(torch.device(arguments.device)), "rows": rows})
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


def measure(name: str, preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds and memory of a preset on a model, by layer and extrapolated."""
    runs = [convert(name, layers, preset, arguments) for layers in (arguments.layers - 1, arguments.layers)]
    layer = runs[1]["seconds"] - runs[0]["seconds"]
    whole = runs[1]["seconds"] + layer * (LAYERS[name] - arguments.layers)
    return {"model": name, "preset": preset, "runs": runs, "layer_seconds": layer, "whole_seconds": whole}


def convert(name: str, layers: int, preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a model of so many layers where it is not there yet, convert it, and return what that took."""
    source, out = arguments.folder / f"{name}-{layers}", arguments.folder / f"{name}-{layers}-{preset}"
    if not (source / "config.json").exists():
        write_model(source, name, layers, arguments.tokenizer, arguments.device, arguments.scale)
    start = time.monotonic()
    command = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", str(source), "-o", str(out), "--overwrite"]
    command += ["--preset", preset, "--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {preset}: {done.stderr[-2000:]}")
    seconds = time.monotonic() - start
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shutil.rmtree(out)
    return {"layers": layers, "seconds": seconds, "source_bytes": size, "said": done.stdout.strip().splitlines()[-1]}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    header = ["model", "preset", "layers measured", "seconds", "seconds a layer", "whole model, extrapolated, minutes"]
    body = [
        [
            row["model"],
            row["preset"],
            str(row["runs"][1]["layers"]),
            f"{row['runs'][1]['seconds']:.0f}",
            f"{row['layer_seconds']:.1f}",
            f"{row['whole_seconds'] / 60:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(header, body)


if __name__ == "__main__":
    main()
