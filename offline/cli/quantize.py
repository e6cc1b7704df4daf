"""``milo quantize``: converts a model folder to a MiLo checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_milo.checkpoint import COMPENSATOR_BITS, GROUP_SIZES
from vllm_milo.head.layout import HEAD_BITS, PLAIN_BITS

from ..calibration import memory
from ..calibration.choose import (
    NONE,
    PACKAGED,
    WINDOW,
    TextOptions,
    calibration_windows,
    check_runs,
    planned_windows,
    remarks,
)
from ..calibration.generated_text import OWN_TEXT
from ..checkpoint.card import CardNotes
from ..checkpoint.claim import Claim
from ..conversion import Conversion, Text
from ..convert import carry_out
from ..effort import CPU_EFFORT, GPU_EFFORT, TUNE_PASSES, TUNE_STEPS, Effort, default_windows, effort_on, steps_of_pass
from ..errors import ConversionError, OtherTokenizerError
from ..evaluation.expert_use import read_expert_counts
from ..learn.end_to_end import TuneOptions
from ..learn.layer import LearnOptions
from ..nouns import METHODS, PLAIN_METHODS, RANK_MULTIPLE, Recipe
from ..planning.describe import describe, format_description, group_notes
from ..planning.devices import find_devices
from ..planning.plan import Plan, make_plan
from ..presets import CALIBRATED_ROUNDS, DEFAULT_PRESET, PLAIN_ROUNDS, PRESETS, Preset, milo_recipe
from ..progress import log_event
from ..ranks.policies import POLICIES, Policy, needs_kurtosis, parse_policies
from ..source.reader import ModelReader
from ..threads import threads_for
from .arguments import HEAD_HELP, OR_HUB, SERVING_HELP, check_number, check_share, command_of, default_device
from .hub import filled, model_place, path, target_repository
from .summary import print_summary

LARGEST_SEED = 2**32
"""Above what every library takes that draws random numbers here."""
MOST_GIB = 2**30
COST = "which on a real model left twice the KL divergence from the original"
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
Without --ranks, method milo gives most ranks to what every token passes and, along a calibration text, shares those of
each layer by what its parts turn out to need; with --ranks or a paper preset the policies are scaled to fit."""
CALIBRATION_HELP = f"""what goes through the model while it is converted (method milo). {PACKAGED} (default, but of
preset fast): the text that comes with the package, a layer of the model in memory at a time; a file: a UTF-8 text, or
.jsonl with "text" or chat "messages" in each line; org/name, org/name:config or org/name:config:split: a dataset of the
Hugging Face Hub with such columns, read by the library datasets; {OWN_TEXT}: what the model writes by itself, which
takes it in memory as a whole; {NONE}: nothing, which takes minutes on a CPU too and is less accurate."""
ZERO_POINTS_HELP = """with --method rtn, hqq or mse: integer for zero points that are integers from 0 to 7, so that
`milo export` can write the checkpoint for other tools; a little less accurate. Default: real"""
_IGNORE_HELP = """module to keep as it is, by name or re:PATTERN; a layer's routed experts stay as a whole, by the name
of their module (model.layers.0.mlp.experts) or a pattern that matches them all"""
OVERWRITE_HELP = """replace an existing MiLo checkpoint, once the new one is whole; without --resume also delete the
finished layers of a conversion that did not end, which are an error otherwise"""
RESUME_HELP = """go on where the same conversion was interrupted or killed, for the same result; begins from the start
where there is nothing to go on with. Model, options and version must be the same as before. Along a calibration text
the finished layers run once more, forward only, which takes a small part of the time that quantizing them took"""
LOG_HELP = """append to this file what happens, as JSON lines with time and event: plan; begin, progress and end of each
stage, with its seconds and those that are left; at last summary, or error"""
PUSH_HELP = """upload the checkpoint to this repository of the Hugging Face Hub, which is created where there is none.
Whether the token may do that is checked before the conversion."""
DEVICES_HELP = """several GPUs, as in cuda:0,cuda:1: the first does what it would alone, the others solve a part of
the matrices of each layer; the result is the same to the byte"""
MEMORY_HELP = """most memory to take on each device; default: what is free, on a CPU no limit. With less than 12 GiB the
solver takes fewer matrices at once, but never less than one, and single codes may come out otherwise"""
STREAM_HELP = """of a model of the Hub: download each file of weights when it is used, beside the output, and
delete it when the layers in it are finished, so that two or three are there at once; what the Hub's cache held before
stays"""
DRY_RUN_HELP = """check everything that can be known before the work, print what would be done, and write nothing: size
on disk, stored bits a weight, memory, tensor parallel sizes. The calibration text is neither cut nor written by the
model, so windows are the most that there can be."""


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("quantize", help="convert a model folder to a MiLo checkpoint")
    parser.add_argument("model", type=model_place, help=f"folder of the source model (safetensors), {OR_HUB}")
    parser.add_argument("-o", "--output", type=path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help=f"method, group size and ranks in one; default: {DEFAULT_PRESET}, unless --method or --ranks is given",
    )
    parser.add_argument("--budget-bits", type=float, metavar="B", help=BUDGET_HELP)
    parser.add_argument("--serving-share", type=float, metavar="S", help=SERVING_HELP)
    parser.add_argument("--calibration", type=filled, metavar="HOW", help=CALIBRATION_HELP)
    windows = f"of {WINDOW} tokens; default: up to {GPU_EFFORT.windows} on a GPU, {CPU_EFFORT.windows} on a CPU"
    parser.add_argument("--calibration-windows", type=int, default=None, help=windows)
    steps = f"training steps of each layer's codes; default: {GPU_EFFORT.steps} on a GPU, {CPU_EFFORT.steps} on a CPU"
    parser.add_argument("--learn-steps", type=int, default=None, help=steps)
    parser.add_argument("--method", choices=METHODS, default=None, help="default: milo")
    parser.add_argument("--ranks", default=None, help=RANKS_HELP + " Default: dense=64 for milo and paper.")
    groups = "default: the preset's, or 64; a matrix whose input size it does not divide gets smaller groups"
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=None, help=groups)
    parser.add_argument("--factors", choices=list(_FACTOR_BITS), default="int3", help="default: %(default)s")
    parser.add_argument("--zero-points", choices=["real", "integer"], default="real", help=ZERO_POINTS_HELP)
    rounds = f"of the solver; default: {CALIBRATED_ROUNDS}, with --calibration {NONE} {PLAIN_ROUNDS}, else 20"
    parser.add_argument("--max-rounds", type=int, default=None, help=rounds)
    parser.add_argument("--lm-head-bits", type=int, choices=HEAD_BITS, default=PLAIN_BITS, help=HEAD_HELP)
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME", help=_IGNORE_HELP)
    parser.add_argument("--expert-counts", type=path, help="file of `milo stats`, for the frequency policy")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", default=default_device())
    where.add_argument("--devices", type=_names, default=[], metavar="D,D,…", help=DEVICES_HELP)
    parser.add_argument("--device-memory", type=float, metavar="GIB", help=MEMORY_HELP)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument("--resume", action="store_true", help=RESUME_HELP)
    parser.add_argument("--quiet", action="store_true", help="say no more than warnings and the result")
    parser.add_argument("--log-json", type=path, metavar="FILE", help=LOG_HELP)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN_HELP)
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON, alone on stdout")
    parser.add_argument("--push-to", type=target_repository, metavar="ORG/NAME", help=PUSH_HELP)
    parser.add_argument("--private", action="store_true", help="with --push-to: a new repository is private")
    parser.add_argument("--delete-source-shards", action="store_true", help=STREAM_HELP)
    parser.set_defaults(run=_run, check=_check, shards=None)


def _names(text: str) -> list[str]:
    return [filled(name).strip() for name in text.split(",")]


def _check(arguments: argparse.Namespace) -> None:
    """Plan a conversion without a word, to find out whether it can be done."""
    trial = argparse.Namespace(**vars(arguments) | {"dry_run": True})
    with contextlib.redirect_stderr(io.StringIO()):
        claim = _claim(trial)
        claim.check()
        plan_conversion(trial, claim)


def _run(arguments: argparse.Namespace) -> Path | None:
    """Convert, or only plan; return the checkpoint's folder."""
    if arguments.json and not arguments.dry_run:
        raise ConversionError("--json is for --dry-run alone; `milo inspect --json` describes a finished checkpoint")
    claim = _claim(arguments)
    if arguments.dry_run:
        claim.check()
        _describe(claim, plan_conversion(arguments, claim), arguments)
        return None
    with claim:  # before a calibration that takes long
        _print_notes(claim, arguments.quiet)
        reader = ModelReader(arguments.model, arguments.shards)
        with threads_for(max((matrix.n * matrix.k for matrix in reader.matrices), default=0)):
            plan = plan_conversion(arguments, claim, reader)
            log_event("plan", **describe(plan))
            if not arguments.quiet:
                print(plan.memory.line(arguments.device), file=sys.stderr)
                if line := plan.layout.line():
                    print(f"note: {line}", file=sys.stderr)
                if arguments.shards and plan.conversion.text and claim.resume and claim.journal.quantized:
                    print("note: finished layers run once more; their shards are downloaded again", file=sys.stderr)
            summary = carry_out(plan, not arguments.quiet, claim)
    return print_summary(summary)


def _claim(arguments: argparse.Namespace) -> Claim:
    arguments.device = (arguments.devices or [arguments.device])[0]
    find_devices([arguments.device, *arguments.devices[1:]])
    _check_numbers(arguments)
    return Claim(arguments.output, arguments.model, arguments.overwrite, arguments.resume)


def _describe(claim: Claim, plan: Plan, arguments: argparse.Namespace) -> None:
    log_event("plan", **describe(plan))
    _print_notes(claim, arguments.quiet)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(describe(plan), indent=2) if arguments.json else format_description(plan))


def _print_notes(claim: Claim, quiet: bool) -> None:
    for note in [] if quiet else claim.notes:
        print(f"note: {note}", file=sys.stderr)


def plan_conversion(arguments: argparse.Namespace, claim: Claim, reader: ModelReader | None = None) -> Plan:
    """Return what the options of the subcommand ask for, checked; prints what is to be noted.

    All that headers tell is checked first, then the calibration text is read.

    Args:
        arguments: of the subcommand.
        claim: of the output, entered or checked.
        reader: of the source model; by default its headers are read now.

    Raises:
        ConversionError, CheckpointError, ShardError: the options contradict each other or the model, there is no such
            text, device or model, or memory or disk do not suffice.
    """
    preset = _preset(arguments)
    method = preset.method if preset else arguments.method or Recipe.method
    reader = reader or ModelReader(arguments.model, arguments.shards)
    learned = _wanted(arguments, preset, method) != NONE and arguments.learn_steps != 0
    plan = make_plan(reader, arguments.output, _without_text(arguments, reader, preset, method, learned), claim)
    text = _text(arguments, reader, preset, method)
    if learned and text is None:  # the default's text cannot go through this model: other groups are better
        learned = False
        plan = make_plan(reader, arguments.output, _without_text(arguments, reader, preset, method, learned), claim)
    for line in [] if arguments.quiet else group_notes(plan):
        print(f"note: {line}", file=sys.stderr)
    recipe = _recipe(arguments, preset, method, learned, text is not None)
    recipe = replace(recipe, narrow=plan.conversion.recipe.narrow)
    return plan.along(replace(plan.conversion, recipe=recipe, text=text), claim)


def decide_conversion(arguments: argparse.Namespace) -> Conversion:
    """Return what the options of the subcommand ask for; see :func:`plan_conversion`."""
    claim = _claim(arguments)
    claim.check()
    return plan_conversion(arguments, claim).conversion


def _without_text(
    arguments: argparse.Namespace, reader: ModelReader, preset: Preset | None, method: str, learned: bool
) -> Conversion:
    """Return what the options ask for, but for a calibration text."""
    budget, share = arguments.budget_bits, arguments.serving_share
    if preset is not None:
        policies = preset.policies(reader.config)
        if budget is None:  # one of the user's is bounded by a share of the user's alone
            budget, share = preset.budget_bits, preset.serving_share if share is None else share
    else:
        policies = _policies(arguments, method)
    check_share(arguments.serving_share, budget is not None and not policies)
    if arguments.delete_source_shards:
        _refuse_whole_model(arguments, preset, policies)
    return Conversion(
        recipe=_recipe(arguments, preset, method, learned, False),
        policies=policies,
        budget_bits=budget,
        serving_share=share,
        splittable=arguments.group_size is None,
        ignore=arguments.ignore,
        lm_head_bits=arguments.lm_head_bits,
        expert_counts=read_expert_counts(arguments.expert_counts) if arguments.expert_counts else {},
        device=arguments.device,
        more_devices=arguments.devices[1:],
        device_memory=None if arguments.device_memory is None else int(arguments.device_memory * 2**30),
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        card=CardNotes(command_of(arguments), arguments.push_to),
    )


def _refuse_whole_model(arguments: argparse.Namespace, preset: Preset | None, policies: Sequence[Policy]) -> None:
    """Refuse what needs all weights at once, or before the first layer is converted."""
    if preset is not None and preset.thorough and arguments.calibration != NONE:
        what = f"--preset {arguments.preset} trains the model as a whole"
    elif arguments.calibration == OWN_TEXT:
        what = f"with --calibration {OWN_TEXT} the model writes as a whole"
    elif needs_kurtosis(policies):
        by = "--ranks" if preset is None else f"--preset {arguments.preset}"
        what = f"{by} ranks experts by kurtosis, for which all weights are looked at first"
    else:
        return
    raise ConversionError(f"--delete-source-shards: {what}; leave out one of the two")


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, least in (("max_rounds", 1), ("calibration_windows", 1), ("learn_steps", 0)):
        check_number(name, getattr(arguments, name), least)
    budget, seed, memory_limit = arguments.budget_bits, arguments.seed, arguments.device_memory
    if memory_limit is not None and not 0 < memory_limit < MOST_GIB:
        raise ConversionError(f"--device-memory {memory_limit:g}: must be a number of GiB above 0, such as 20")
    if budget is not None and not 0 < budget < float("inf"):
        raise ConversionError(f"--budget-bits {budget:g}: must be a number of bits above 0, such as 3.6")
    if not 0 <= seed < LARGEST_SEED:
        raise ConversionError(f"--seed {seed}: must be a number from 0 to {LARGEST_SEED - 1}")
    if arguments.ranks is not None and not arguments.ranks.strip(" ,"):
        raise ConversionError("--ranks: is empty; name a policy, as in dense=64, or leave the option out")


def _recipe(arguments: argparse.Namespace, preset: Preset | None, method: str, learned: bool, along: bool) -> Recipe:
    groups = preset.groups(learned, arguments.budget_bits) if preset is not None else Recipe.group_size
    choices = {
        "group_size": arguments.group_size or groups,
        "factor_bits": _FACTOR_BITS[arguments.factors],
        "seed": arguments.seed,
        **({"max_rounds": arguments.max_rounds} if arguments.max_rounds else {}),
    }
    if arguments.zero_points == "integer":
        if method not in PLAIN_METHODS:
            raise ConversionError(f"--zero-points integer is for --method {', '.join(PLAIN_METHODS)} alone")
        choices["integer_zeros"] = True
    return milo_recipe(along, **choices) if method == "milo" else Recipe(method=method, **choices)


def _wanted(arguments: argparse.Namespace, preset: Preset | None, method: str) -> str:
    """Return the calibration text that is asked for, or the default of the preset and method."""
    calibrated = method == "milo" and (preset is None or preset.calibrated)
    return arguments.calibration or (PACKAGED if calibrated else NONE)


def _text(arguments: argparse.Namespace, reader: ModelReader, preset: Preset | None, method: str) -> Text | None:
    """Return the calibration text that is asked for, or the default of the preset and method; None for none."""
    asked = arguments.calibration
    if method != "milo" and asked not in (None, NONE):
        raise ConversionError(f"--method {method} cannot use --calibration; use --method milo")
    wanted = _wanted(arguments, preset, method)
    thorough = preset is not None and preset.thorough
    if wanted == NONE:
        if thorough:
            print(
                f"warning: --preset {arguments.preset} learns from a text; without one it learns nothing",
                file=sys.stderr,
            )
        return None
    effort = effort_on(arguments.device)
    number = arguments.calibration_windows
    number = number or default_windows(reader, arguments.device, wanted, thorough)
    options = TextOptions(number, arguments.device, arguments.seed, not arguments.quiet)
    try:
        read = planned_windows if arguments.dry_run else calibration_windows
        check_runs(reader)
        windows = read(reader, wanted, options)
    except ConversionError as error:
        if asked is not None or isinstance(error, OtherTokenizerError):  # which a conversion would hand on
            raise
        print(
            f"warning: no calibration: {error}. Quantizing without one (--calibration {NONE}), {COST}", file=sys.stderr
        )
        return None
    for remark in [] if arguments.dry_run else remarks(arguments.model, wanted, windows, number):
        if not (arguments.quiet and remark.startswith("note: ")):
            print(remark, file=sys.stderr)
    if not arguments.quiet and not arguments.dry_run:
        print(f"calibration: {len(windows)} windows of {windows.shape[1]} tokens", file=sys.stderr)
    steps = arguments.learn_steps
    if steps is None:
        steps = max(effort.steps, steps_of_pass(len(windows), effort)) if thorough else effort.steps
    learn = LearnOptions(steps=steps, batch=min(effort.batch, len(windows)), seed=arguments.seed)
    return Text(wanted, windows, learn, _tune(arguments, reader, effort, len(windows)) if thorough and steps else None)


def _tune(arguments: argparse.Namespace, reader: ModelReader, effort: Effort, windows: int) -> TuneOptions | None:
    """Return how the whole model is trained, where it fits into memory twice."""
    need, have = memory.tuning_need(reader, arguments.device), memory.available(arguments.device)
    if need > have:
        print(
            f"warning: training the whole model takes {memory.gib(need)} on {arguments.device}, and "
            f"{memory.gib(have)} are free; its layers are trained one by one only",
            file=sys.stderr,
        )
        return None
    steps = max(TUNE_STEPS * effort.steps, TUNE_PASSES * steps_of_pass(windows, effort))
    return TuneOptions(steps=steps, batch=min(effort.batch, windows), seed=arguments.seed)


def _preset(arguments: argparse.Namespace) -> Preset | None:
    """Return the preset, or None where the method or the ranks are chosen by hand."""
    by_hand = [f"--{name}" for name in ("method", "ranks") if getattr(arguments, name) is not None]
    if arguments.preset is None:
        return None if by_hand else PRESETS[DEFAULT_PRESET]
    if by_hand:
        raise ConversionError(f"--preset {arguments.preset} and {by_hand[0]} exclude each other; drop one")
    return PRESETS[arguments.preset]


def _policies(arguments: argparse.Namespace, method: str) -> list[Policy]:
    if method in PLAIN_METHODS:
        for option, value in (("--ranks", arguments.ranks), ("--budget-bits", arguments.budget_bits)):
            if value:
                raise ConversionError(f"{option} needs compensators, which --method {method} has not")
        return []
    if arguments.ranks is None:
        return [] if method == "milo" and arguments.budget_bits is not None else parse_policies(DEFAULT_RANKS)
    return parse_policies(arguments.ranks)
