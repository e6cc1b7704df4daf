"""From the start of a process to the first token in vLLM: seconds by what they are spent on, and peak memory.

    python -m benchmarks.serving.load CHECKPOINT -o out/load.json
    python -m benchmarks.serving.load --model mixtral --folder /dev/shm/mixtral -o out/load.json [--layers 4]
    python -m benchmarks.serving.load --model mixtral --folder /dev/shm/mixtral --quantize -o out/load.json --starts 1

CHECKPOINT is a folder of `milo quantize`. Without one, a checkpoint of random codes with ragged ranks is written to
FOLDER, in the shapes of Mixtral-8x7B (21 GB) or Qwen3-30B-A3B (13 GB), unless it is there; /dev/shm is memory, so that
no disk counts. With ``--quantize`` the folder is or becomes a model in 16 bits (93 or 61 GB), quantized at load. Each
start is a process of its own. The first finds no compiled kernels: the caches of Triton, torch and vLLM are in an empty
folder. The others find what the first has left. Parts are what the plugin logs at the end of a load (of several
processes the slowest); the peak is that of a process until then. The rest is vLLM's: imports, its own start,
torch.compile and CUDA graphs (none with ``--eager``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.offline.random_model import LAYERS, write_model
from benchmarks.processes import run_main
from benchmarks.records import markdown_table, write_json
from benchmarks.serving.checkpoints import write_checkpoint
from benchmarks.serving.decode import ENVIRONMENT, SHOWN_LOG

TOKENIZER = ROOT / "tests" / "assets" / "tiny-qwen2-moe"
"""Whose files a model in 16 bits gets; only its ids are used."""
LINE = re.compile(
    r"MiLo loaded (\d+) layers in ([\d.]+) s: reading ([\d.]+) s, repacking ([\d.]+) s, warming up ([\d.]+) s; "
    r"at most ([\d.]+) GiB"
)
KERNELS = re.compile(
    r"MiLo's kernels are ready: (\d+), which took ([\d.]+) s of threads; the first step waited ([\d.]+) s"
)
KERNEL_FIELDS = ("kernels", "compiling_threads", "first_step_waited")
"""What the plugin says of kernels before the first step, in its order; nothing where none are compiled."""
QUANTIZED = re.compile(
    r"MiLo quantized (\d+) matrices in (\d+) batches: ([\d.]+) s of solving, ([\d.]+) s of waiting for weights"
)
QUANTIZED_FIELDS = ("matrices", "batches", "solving", "waiting")
"""What the plugin's line on quantizing at load says, in its order."""
FIELDS = ("layers", "load", "reading", "repacking", "warming_up", "peak_gib")
"""What the plugin's line says, in its order; seconds but for the first and the peak."""


def parts_of(log: str) -> dict[str, float]:
    """Return what the plugin logged of a load, by :data:`FIELDS`; the largest of each where several processes did.

    And by :data:`KERNEL_FIELDS` and :data:`QUANTIZED_FIELDS`, where it compiled and quantized.

    Raises:
        SystemExit: there is no such line.
    """
    if not LINE.search(log):
        raise SystemExit(f"the plugin logged no load: is this a MiLo checkpoint?\n...{log[-SHOWN_LOG:]}")
    largest = (_largest(LINE, FIELDS, log), _largest(KERNELS, KERNEL_FIELDS, log))
    return largest[0] | largest[1] | _largest(QUANTIZED, QUANTIZED_FIELDS, log)


def _largest(line: re.Pattern[str], fields: Sequence[str], log: str) -> dict[str, float]:
    found = [dict(zip(fields, map(float, groups), strict=True)) for groups in line.findall(log)]
    return {field: max(one[field] for one in found) for field in fields if found}


def start(checkpoint: Path, arguments: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """Start vLLM in a process of its own, ask for a token, and return the row.

    Raises:
        SystemExit: vLLM failed; the message ends with its log.
    """
    engine = {
        "max_model_len": arguments.max_model_len,
        "enforce_eager": arguments.eager,
        "tensor_parallel_size": arguments.tensor_parallel,
        "gpu_memory_utilization": arguments.gpu_memory,
        "dtype": arguments.dtype,
    }
    if arguments.quantize:
        engine["quantization"] = "milo"
    folders = {"TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | ENVIRONMENT
    environment |= {name: str(caches / folder) for name, folder in folders.items()}
    if arguments.tensor_parallel > 1:
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with tempfile.TemporaryDirectory() as folder:
        job, out, log = (Path(folder) / name for name in ("job.json", "out.json", "vllm.log"))
        begun = time.time()
        job.write_text(json.dumps({"folder": str(checkpoint), "engine": engine, "begun": begun}))
        words = (str(job), str(out))
        code = run_main("benchmarks.serving.first_token", *words, folder=Path(folder), log=log, environment=environment)
        text = log.read_text(errors="replace")
        if code != 0 or not out.exists():
            raise SystemExit(f"vLLM ended with {code}: ...{text[-SHOWN_LOG:]}")
        return json.loads(out.read_text()) | parts_of(text)


def format_report(record: dict[str, Any]) -> str:
    """Return the table."""
    header = ["start", "to the first token, s", "imports", "engine", "of it load", "reading", "repacking", "warming up"]
    header += ["peak, GiB", "kernels", "first step waited"]
    rows = []
    for number, row in enumerate(record["rows"]):
        seconds = [row[key] for key in ("first_token", "imports", "engine", *FIELDS[1:5])]
        last = [f"{row['peak_gib']:.2f}", f"{row.get('kernels', 0):.0f}", f"{row.get('first_step_waited', 0):.2f}"]
        rows.append(["nothing cached" if number == 0 else "again", *(f"{value:.2f}" for value in seconds), *last])
        if "solving" in row:
            rows[-1] += [f"{row['solving']:.2f}"]
    if record["quantized"]:
        header += ["solving"]
    device = record["rows"][0]["environment"]
    size = record["bytes"] / 1e9
    title = f"Loading {size:.2f} GB on {device['device']} (vLLM {device['vllm']}), {record['processes']} process(es)."
    return f"{title}\n\n{markdown_table(header, rows)}"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; write JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--model", choices=list(LAYERS), help="shapes of a checkpoint to make, in place of one")
    parser.add_argument("--folder", type=Path, help="where it is made")
    parser.add_argument("--layers", type=int, help="of it; default: all")
    parser.add_argument("--quantize", action="store_true", help="a model in 16 bits is quantized at load")
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes by this, for a trial")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("-tp", "--tensor-parallel", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--gpu-memory", type=float, default=0.9, help="vLLM's gpu_memory_utilization")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor CUDA graphs")
    arguments = parser.parse_args(words)
    checkpoint: Path | None = arguments.checkpoint
    if (checkpoint is None) == (arguments.model is None) or (checkpoint is None) != (arguments.folder is not None):
        parser.error("name a checkpoint, or --model and --folder")
    if checkpoint is None:
        checkpoint = Path(arguments.folder)
        layers = arguments.layers or LAYERS[arguments.model]
        if (checkpoint / "config.json").exists():
            print(f"taking the model in {checkpoint}")
        elif arguments.quantize:
            write_model(checkpoint, arguments.model, layers, TOKENIZER, _device(), arguments.scale)
        else:
            write_checkpoint(checkpoint, arguments.model, layers, arguments.scale)
    checkpoint = checkpoint.resolve()
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    about = {"benchmark": "load", "bytes": size, "processes": arguments.tensor_parallel}
    record: dict[str, Any] = about | {"eager": arguments.eager, "quantized": arguments.quantize, "rows": []}
    with tempfile.TemporaryDirectory() as caches:
        for _ in range(arguments.starts):
            record["rows"].append(start(checkpoint, arguments, Path(caches)))
            write_json(arguments.output, record)
    print(format_report(record))


if __name__ == "__main__":
    main()
