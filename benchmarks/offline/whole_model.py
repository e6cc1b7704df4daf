"""Seconds of ``milo quantize`` on a model of full depth, by what they are spent on.

    python -m benchmarks.offline.whole_model mixtral qwen3 --tokenizer FOLDER --folder SCRATCH -o OUT.json
        [--preset fast] [--devices cuda:0 cuda:0,cuda:1,cuda:2,cuda:3] [--layers 4]

Writes a model with random weights in the shapes of Mixtral-8x7B (93 GB) or Qwen3-30B-A3B (61 GB) into SCRATCH, which
has room for it and for the checkpoint and lies in memory if disks are not to count (/dev/shm), and converts it by the
command, once with each of ``--devices``. Whole seconds are the process's, imports counted. What they went on is by the
converter's own account (``--log-json``): reading, solving and writing go on beside each other; in what it waited, the
first device had nothing to solve, or finished layers had to wait for the disk. FOLDER holds a tokenizer: only its ids
are used. ``--layers`` cuts the model, for a trial.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.offline.random_model import LAYERS, add_model_arguments, write_model
from benchmarks.records import environment, markdown_table, write_json


def main() -> None:
    """Write and convert the models, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--devices", nargs="+", default=["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--layers", type=int, help="default: all")
    arguments = parser.parse_args()
    first = arguments.devices[0].split(",")[0]
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        layers = arguments.layers or LAYERS[name]
        source = arguments.folder / f"{name}-{layers}"
        if not (source / "config.json").exists():
            write_model(source, name, layers, arguments.tokenizer, first, arguments.scale)
        for devices in arguments.devices:
            rows.append({"model": name, "layers": layers, **convert(source, arguments.preset, devices)})
            write_json(arguments.output, {"environment": environment(torch.device(first)), "rows": rows})
            print(table(rows), flush=True)
        shutil.rmtree(source)


def convert(source: Path, preset: str, devices: str) -> dict[str, Any]:
    """Convert a model by the command; return what that took. The checkpoint is deleted."""
    out = source.with_name(f"{source.name}-{preset}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        command = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", str(source), "-o", str(out)]
        command += ["--overwrite", "--preset", preset, "--devices", devices, "--log-json", str(log)]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
        if done.returncode:
            raise SystemExit(f"{source}, {devices}: {done.stderr[-2000:]}")
        summary = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    shutil.rmtree(out)
    taken = ("spent", "bytes_written", "peak_host_bytes", "peak_device_bytes", "bits_per_weight")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    about = {"preset": preset, "devices": devices, "seconds": seconds, "source_bytes": size}
    return about | {key: summary[key] for key in taken}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    header = ["model", "layers", "preset", "devices", "seconds", "reading", "solving", "writing", "waited: jobs, disk"]
    body = []
    for row in rows:
        spent = row["spent"]
        solving = ", ".join(f"{seconds:.0f}" for seconds in spent["solving"].values())
        waited = f"{spent['waiting_for_jobs']:.1f}, {spent['waiting_for_the_disk']:.1f}"
        first = [row["model"], str(row["layers"]), row["preset"], row["devices"], f"{row['seconds']:.0f}"]
        body.append([*first, f"{spent['reading']:.1f}", solving, f"{spent['writing']:.1f}", waited])
    return markdown_table(header, body)


if __name__ == "__main__":
    main()
