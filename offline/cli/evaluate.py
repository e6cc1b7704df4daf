"""``milo eval``: how good a model or a checkpoint is on texts, by itself or beside the model that it was made of."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.card import Measured, update_card
from ..checkpoint.output import is_milo_checkpoint
from ..errors import ConversionError
from ..evaluation.divergence import divergences, open_streamed, refuse_strangers, text_windows
from ..evaluation.model import load_model
from ..evaluation.perplexity import STRIDE, WINDOW, perplexity
from ..hub_names import hub_origin
from ..source.foreign import transformers_errors
from ..source.tokens import read_tokens
from .arguments import add_text_arguments, check_text_arguments
from .hub import model_place

REFERENCE_WINDOW = 512


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser's ``commands``."""
    parser = commands.add_parser("eval", help="measure a model or MiLo checkpoint on texts")
    add_text_arguments(parser, several=True)
    reference = "the model it was made of: KL divergence, top-1 agreement and router flips, a layer in memory at a time"
    parser.add_argument("--reference", type=model_place, help=reference)
    window = f"tokens of a window (default: {WINDOW}; with --reference {REFERENCE_WINDOW})"
    parser.add_argument("--window", type=int, default=None, help=window)
    stride = f"tokens between windows (default: {STRIDE}, or a window where that is less)"
    parser.add_argument("--stride", type=int, default=None, help=stride)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    card = "with --reference: write what was measured into the checkpoint's model card (README.md)"
    parser.add_argument("--update-card", action="store_true", help=card)
    parser.set_defaults(run=_run, check=_check)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused by the options alone."""
    check_text_arguments(arguments)
    if arguments.window is not None and arguments.window < 2:
        raise ConversionError(
            f"--window {arguments.window}: must be at least 2, since the first token is not predicted"
        )
    if arguments.stride is not None and not 0 < arguments.stride <= (arguments.window or WINDOW):
        raise ConversionError(
            f"--stride {arguments.stride}: must be from 1 to the window of {arguments.window or WINDOW} tokens"
        )
    if arguments.update_card and arguments.reference is None:
        raise ConversionError("--update-card needs --reference: a card states distances from the original model")


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    if arguments.update_card:
        _check_card(arguments.model)
    with transformers_errors(arguments.model, "run this model"):
        if arguments.reference is None:
            _print_perplexities(arguments)
        else:
            _print_divergences(arguments)


def _check_card(model: Path) -> None:
    """Refuse to write a card that is not the converter's to write."""
    if not is_milo_checkpoint(model):
        raise ConversionError(f"--update-card: {model} is no MiLo checkpoint, so its card is not written")
    if hub_origin(model) is not None:
        raise ConversionError(
            f"--update-card: {model} lies in the Hub's cache, which must stay as it was downloaded; download the "
            f"checkpoint to a folder of its own (`hf download ORG/NAME --local-dir FOLDER`)"
        )


def _print_perplexities(arguments: argparse.Namespace) -> None:
    tokens = {text: read_tokens(arguments.model, text) for text in arguments.text}  # before the model, which takes long
    model = load_model(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    for text in tokens:
        result = perplexity(
            model,
            tokens[text],
            arguments.max_windows,
            window=arguments.window or WINDOW,
            stride=arguments.stride,
            progress=not arguments.quiet,
        )
        if arguments.json:
            print(json.dumps({"model": str(arguments.model), "text": str(text), **result._asdict()}))
        else:
            print(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.windows} windows")
            print(f"protocol: {result.protocol}; {arguments.dtype}; text {text}")


def _print_divergences(arguments: argparse.Namespace) -> None:
    folders = (arguments.model, arguments.reference)
    refuse_strangers(*folders)
    length, most = arguments.window or REFERENCE_WINDOW, arguments.max_windows
    windows = {text: text_windows(*folders, text, length, most) for text in arguments.text}
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    model, reference = (open_streamed(folder, device, dtype) for folder in folders)
    found = divergences(model, reference, list(windows.values()), not arguments.quiet)
    rows = dict(zip(windows, found, strict=True))
    mean = sum(row.kl for row in rows.values()) / len(rows)
    if arguments.update_card:
        measured = [
            Measured(text.name, row.kl, row.top1, row.perplexity, row.reference_perplexity, row.tokens)
            for text, row in rows.items()
        ]
        update_card(arguments.model, arguments.reference, measured)
    if arguments.json:
        texts = [{"text": str(text), **row._asdict()} for text, row in rows.items()]
        names = {"model": str(arguments.model), "reference": str(arguments.reference)}
        print(json.dumps({**names, "texts": texts, "mean_kl": mean}))
        return
    print(f"{'KL':>8} {'top-1':>7} {'perplexity':>11} {'reference':>10} {'flips':>7} {'windows':>8}  text")
    for text, row in rows.items():
        flips = "-" if row.router_flips is None else f"{row.router_flips:.4f}"
        numbers = f"{row.kl:8.4f} {row.top1:7.4f} {row.perplexity:11.4f} {row.reference_perplexity:10.4f} {flips:>7}"
        print(f"{numbers} {row.windows:8d}  {text}")
    length = found[0].tokens // found[0].windows
    print(f"{mean:8.4f} nats a token on average; windows of {length} tokens; {arguments.dtype}")
    if any(row.router_flips is not None for row in found):
        print("flips: share of the tokens that a layer sends to another set of experts, mean over layers")
