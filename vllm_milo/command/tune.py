"""``milo tune``: makes files of tiles for a model's experts on this machine's GPU."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from vllm_milo.command.expert_layers import PLANNED, expert_shapes
from vllm_milo.kernels.weights import MoEShape
from vllm_milo.offline.cli.arguments import OR_HUB, check_number
from vllm_milo.offline.cli.hub import model_place
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.presets import DEFAULT_PRESET

MINUTES, LEAST_MINUTES = 5.0, 0.5
WORTH = 10
"""A shape is tuned if at least one in so many layers has it; the others take the nearest file of ranks."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("tune", help="search the fastest tiles for a model's experts on this GPU")
    parser.add_argument(
        "checkpoint",
        type=model_place,
        help=f"folder of a MiLo checkpoint or of a source model, {OR_HUB}, of which only headers are read",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("milo-tuned"), help="folder of the files (default: milo-tuned)"
    )
    parser.add_argument("--device", default="cuda:0", help="a GPU (default: cuda:0)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: 5)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each expert (default: 1)")
    parser.add_argument(
        "--preset",
        choices=PLANNED,
        default=DEFAULT_PRESET,
        help=f"that converts a source model (default: {DEFAULT_PRESET}); fast is what quantizing at load gives",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of activations")
    parser.set_defaults(run=_run, headers_only=True)


def _run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    check_number("tensor_parallel", arguments.tensor_parallel, 1)
    if not LEAST_MINUTES <= arguments.minutes <= 600:
        raise ConversionError(f"--minutes {arguments.minutes:g}: must be from {LEAST_MINUTES:g} to 600")
    device = find_gpu(arguments.device)
    shapes = frequent(expert_shapes(arguments.checkpoint, arguments.tensor_parallel, arguments.preset))
    written = []
    for place, (shape, layers) in enumerate(shapes.items()):
        left = 60 * arguments.minutes - (time.monotonic() - start)
        seconds = max(60 * LEAST_MINUTES / 2, left / (len(shapes) - place))
        print(f"{layers} layer{'s' if layers > 1 else ''} of {describe(shape)}, {seconds:.0f} s", flush=True)
        written.append(_tune(shape, device, seconds, DTYPES[arguments.dtype], arguments.output))
    folder = arguments.output.resolve()
    print(f"wrote {len(written)} file{'s' if len(written) > 1 else ''}; vLLM finds them with ")
    print(f"VLLM_TUNED_CONFIG_FOLDER={folder}")


def frequent(shapes: dict[MoEShape, int]) -> dict[MoEShape, int]:
    """Return the shapes that are worth a file: one of each file's name, in one of :data:`WORTH` layers or more."""
    from vllm_milo.kernels.tuned import make_key

    merged: dict[str, tuple[MoEShape, int]] = {}
    for shape, layers in shapes.items():
        name = make_key(shape, "", torch.bfloat16).file_name
        first, before = merged.get(name, (shape, 0))
        merged[name] = first, before + layers
    total = sum(shapes.values())
    found = sorted(merged.values(), key=lambda pair: -pair[1])
    return {shape: layers for shape, layers in found if WORTH * layers >= total} or dict(found[:1])


def find_gpu(name: str) -> torch.device:
    """Return the GPU that ``--device`` names.

    Raises:
        ConversionError: torch finds no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConversionError(f"--device {name}: no device of torch; give cuda:0 or the like") from None
    if device.type != "cuda":
        raise ConversionError(f"--device {name}: tiles are tuned on a GPU; give cuda:0 or the like")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        raise ConversionError(
            f"--device {name}: torch finds no GPU here; tune on the machine that serves, whose tiles these are"
        )
    index = device.index or 0
    if index >= found:
        raise ConversionError(f"--device {name}: torch finds {found} GPU{'s' if found > 1 else ''} here")
    return torch.device("cuda", index)


def describe(shape: MoEShape) -> str:
    """Return a shape for people."""
    return (
        f"{shape.experts} experts of {shape.hidden} x {shape.intermediate}, {shape.top_k} a token, groups of "
        f"{shape.groups[0]} and {shape.groups[1]}, ranks up to {shape.ranks[0]} and {shape.ranks[1]}"
    )


def _tune(shape: MoEShape, device: torch.device, seconds: float, dtype: torch.dtype, folder: Path) -> Path:
    import triton

    from vllm_milo.kernels.tuned import device_name, make_key, write_file
    from vllm_milo.kernels.tuning.tune import chosen, tune

    path = folder / make_key(shape, device_name(device), dtype).file_name
    results = tune(shape, device, seconds, dtype, say=lambda line: print(f"  {line}", flush=True))
    try:
        write_file(path, chosen(results, shape, device), triton.__version__)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be written: {error.strerror}; give -o another folder") from None
    print(f"  {path}", flush=True)
    return path
