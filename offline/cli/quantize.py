"""``milo quantize``: converts a model folder to a MiLo checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vllm_milo.checkpoint import COMPENSATOR_BITS, GROUP_SIZES
from vllm_milo.shards import read_json

from ..calibration.choose import MOMENTS, NONE, WEIGHTS, TextOptions, moment_source
from ..calibration.generated_text import OWN_TEXT
from ..calibration.gram import FEEDBACK_ROUNDS, ROUNDS
from ..checkpoint.inspect import inspect_checkpoint
from ..checkpoint.output import refuse_unsafe_output
from ..conversion import Conversion
from ..convert import Summary, convert
from ..errors import ConversionError
from ..evaluation.expert_use import read_expert_counts
from ..nouns import METHODS, PLAIN_METHODS, RANK_MULTIPLE, Recipe
from ..presets import DEFAULT_PRESET, PRESETS, Preset
from ..ranks.policies import POLICIES, Policy, parse_policies
from .arguments import default_device

DEFAULT_RANKS = "dense=64"
"""Of methods with compensators whose ranks nothing else decides."""
_FACTOR_BITS = {"int3": 3, "int8": 8, "16": 16}
assert set(_FACTOR_BITS.values()) == set(COMPENSATOR_BITS)
RANKS_HELP = f"""rank policies, comma-separated, added up; each NAME=R with NAME one of {", ".join(POLICIES)}:
uniform: all matrices; dense: attention, shared experts and dense FFNs; sparse: routed experts;
kurtosis: routed experts, mean rank R, doubling with each 1 of excess kurtosis (at most 6 doublings);
kurtosis-paper: the release's formula for 16 or 32; frequency: routed experts by use, mean rank R in each
layer (needs --expert-counts). Ranks are rounded to multiples of {RANK_MULTIPLE} and capped at min(N, K)."""
BUDGET_HELP = """average stored bits of a quantized weight, codes, scales, zero points and compensators counted.
Without --ranks, method milo gives the ranks to the matrices where they remove most of the expected loss; with --ranks
or a paper preset the policies are scaled to fit."""
CALIBRATION_HELP = f"""what to weigh errors by (method milo). {WEIGHTS} (default): what the weights themselves tell
about the inputs of every matrix, without data or a forward pass; a file: a UTF-8 text; {OWN_TEXT} (default of preset
best): a text that the model writes by itself, which needs no data but the whole model in memory; {NONE}: nothing."""
MOMENTS_HELP = """what a calibration on a text measures. full: inputs of every matrix and gradients at its outputs,
which needs the whole model in float32 on the device; inputs: a layer at a time, for models of any size; auto (default):
full if it fits, else inputs."""


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("quantize", help="convert a model folder to a MiLo checkpoint")
    parser.add_argument("model", type=Path, help="folder of the source model (safetensors)")
    parser.add_argument("-o", "--output", type=_folder, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help=f"method, group size and ranks in one; default: {DEFAULT_PRESET}, unless --method or --ranks is given",
    )
    parser.add_argument("--budget-bits", type=float, metavar="B", help=BUDGET_HELP)
    parser.add_argument("--calibration", metavar="HOW", help=CALIBRATION_HELP)
    parser.add_argument("--calibration-windows", type=int, default=64, help="default: %(default)s of 512 tokens")
    parser.add_argument("--calibration-moments", choices=MOMENTS, default="auto", help=MOMENTS_HELP)
    parser.add_argument("--method", choices=METHODS, default=None, help="default: milo")
    parser.add_argument("--ranks", default=None, help=RANKS_HELP + " Default: dense=64 for milo and paper.")
    parser.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, default=None, help="default: the preset's, or 64"
    )
    parser.add_argument("--factors", choices=list(_FACTOR_BITS), default="int3", help="default: %(default)s")
    rounds = f"default: {Recipe.max_rounds}; {ROUNDS} with --calibration {WEIGHTS}"
    parser.add_argument("--max-rounds", type=int, default=None, help=rounds)
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME", help="layer to keep as it is")
    parser.add_argument("--expert-counts", type=Path, help="file of `milo stats`, for the frequency policy")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing MiLo checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run)


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; is a shell variable unset?")
    return Path(text)


def _run(arguments: argparse.Namespace) -> None:
    refuse_unsafe_output(arguments.output, arguments.model, arguments.overwrite)  # before a calibration that takes long
    preset = _preset(arguments)
    method = preset.method if preset else arguments.method or Recipe.method
    budget = arguments.budget_bits
    if preset is not None:
        policies = preset.policies(read_json(arguments.model / "config.json")) if preset.fractions else []
        budget = preset.budget_bits if budget is None else budget
    else:
        policies = _policies(arguments, method)
    if arguments.max_rounds is not None and arguments.max_rounds < 1:
        raise ConversionError("--max-rounds must be at least 1")
    calibration = _calibration(arguments, preset, method)
    text = TextOptions(
        windows=arguments.calibration_windows,
        moments=arguments.calibration_moments,
        device=arguments.device,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    conversion = Conversion(
        recipe=Recipe(
            method=method,
            group_size=arguments.group_size or (preset.group_size if preset else Recipe.group_size),
            factor_bits=_FACTOR_BITS[arguments.factors],
            max_rounds=arguments.max_rounds or (ROUNDS if calibration == WEIGHTS else Recipe.max_rounds),
            seed=arguments.seed,
            feedback_rounds=FEEDBACK_ROUNDS if calibration == WEIGHTS else Recipe.feedback_rounds,
        ),
        policies=policies,
        budget_bits=budget,
        calibration=moment_source(arguments.model, calibration, text),
        ignore=arguments.ignore,
        expert_counts=read_expert_counts(arguments.expert_counts) if arguments.expert_counts else {},
        device=arguments.device,
        overwrite=arguments.overwrite,
    )
    _print_summary(convert(arguments.model, arguments.output, conversion, progress=not arguments.quiet))


def _preset(arguments: argparse.Namespace) -> Preset | None:
    """Return the preset, or None where the method or the ranks are chosen by hand."""
    by_hand = [f"--{name}" for name in ("method", "ranks") if getattr(arguments, name) is not None]
    if arguments.preset is None:
        return None if by_hand else PRESETS[DEFAULT_PRESET]
    if by_hand:
        raise ConversionError(f"--preset {arguments.preset} and {by_hand[0]} exclude each other; drop one")
    return PRESETS[arguments.preset]


def _calibration(arguments: argparse.Namespace, preset: Preset | None, method: str) -> str:
    """Return what to weigh errors by, as given or the default of the preset and method."""
    if method != "milo":
        if arguments.calibration not in (None, NONE):
            raise ConversionError(f"--method {method} cannot use --calibration; use --method milo")
        return NONE
    if arguments.calibration is None:
        return OWN_TEXT if preset is not None and preset.calibrated else WEIGHTS
    return str(arguments.calibration)


def _policies(arguments: argparse.Namespace, method: str) -> list[Policy]:
    if method in PLAIN_METHODS:
        for option, value in (("--ranks", arguments.ranks), ("--budget-bits", arguments.budget_bits)):
            if value:
                raise ConversionError(f"{option} needs compensators, which --method {method} has not")
        return []
    if arguments.ranks is None:
        return [] if method == "milo" and arguments.budget_bits is not None else parse_policies(DEFAULT_RANKS)
    return parse_policies(arguments.ranks)


def _print_summary(summary: Summary) -> None:
    for warning in summary.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    peak = f"{summary.peak_host_bytes / 2**30:.2f} GiB of host memory"
    if summary.peak_device_bytes:
        peak += f", {summary.peak_device_bytes / 2**30:.2f} GiB of device memory"
    report = inspect_checkpoint(summary.out)
    print(
        f"{summary.out}: {summary.matrices} matrices in {summary.seconds:.1f} s, "
        f"{summary.bytes_written / 2**20:.1f} MiB, {report['bits_per_weight']:.3f} bits a weight, "
        f"mean relative error {summary.mean_error:.4f}; peak {peak}"
    )
