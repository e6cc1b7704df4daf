"""What ``--calibration`` names: the source of the moments that errors are weighed by."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError
from ..source.reader import ModelReader
from ..source.tokens import read_tokens
from ..source.whole_model import load_source_model
from . import memory
from .generated_text import OWN_TEXT, write_windows
from .gram import WeightMoments
from .moment_source import MomentSource, PlainSquares
from .streamed import calibrate_streamed
from .text_moments import Calibration
from .whole_model import calibrate
from .windows import WINDOW, spread_windows

WEIGHTS = "weights"
NONE = "none"
MOMENTS = ("auto", "full", "inputs")


@dataclass(frozen=True)
class TextOptions:
    """How a model is calibrated on a text.

    Attributes:
        windows: number of windows.
        moments: ``full`` takes gradients too, ``inputs`` goes a layer at a time, ``auto`` is full where that fits.
        device: where the model runs.
        seed: of what the model writes and of the labels drawn from it.
        progress: show progress bars.
    """

    windows: int = 64
    moments: str = "auto"
    device: str = "cpu"
    seed: int = 0
    progress: bool = False


def moment_source(folder: Path, calibration: str, options: TextOptions) -> MomentSource:
    """Return the source of moments for a model folder.

    Args:
        folder: the source model.
        calibration: ``none``, ``weights``, ``self``, or the name of a text file.
        options: how a text, given or the model's own, is used.

    Raises:
        ConversionError, ShardError: the model or the text cannot be read or does not fit into memory.
    """
    if calibration in (NONE, WEIGHTS):
        if options.moments != "auto":
            raise ConversionError(
                f"--calibration-moments {options.moments} is about a text: add --calibration TEXT or {OWN_TEXT}"
            )
        return PlainSquares() if calibration == NONE else WeightMoments()
    return _from_text(folder, calibration, options)


def _from_text(folder: Path, text: str, options: TextOptions) -> Calibration:
    """Run the model on the calibration text, in windows spread over all of it; a layer at a time if it is large."""
    reader = ModelReader(folder)
    windows = None if text == OWN_TEXT else spread_windows(read_tokens(folder, Path(text)), options.windows)
    if _fits_whole(reader, options):
        model = load_source_model(folder, device=options.device)
        whole = windows if windows is not None else _write(model, options)
        calibration = calibrate(model, whole, options.seed, options.progress)
    else:
        if windows is None:
            memory.refuse_to_write_what_does_not_fit(reader, options.device)
            windows = _write(load_source_model(folder, torch.bfloat16, options.device), options)
        memory.refuse_what_does_not_fit(reader, windows.numel(), options.device)
        calibration = calibrate_streamed(reader, windows, options.device, options.progress)
    calibration.own_text = text == OWN_TEXT
    return calibration


def _write(model: Any, options: TextOptions) -> torch.Tensor:
    length = min(WINDOW, int(model.config.max_position_embeddings))
    return write_windows(model, options.windows, length, options.seed, options.progress)


def _fits_whole(reader: ModelReader, options: TextOptions) -> bool:
    """Return whether to run the model as a whole, for gradients too; say so on stderr if that is refused for memory."""
    if options.moments == "inputs":
        return False
    need, have = memory.whole_model_need(reader), memory.available(options.device)
    if need <= have:
        return True
    lack = (
        f"gradients need the whole model with all moments on {options.device}: {memory.gib(need)}, "
        f"and {memory.gib(have)} are free"
    )
    if options.moments == "full":
        raise ConversionError(f"--calibration-moments full: {lack}; use --calibration-moments inputs")
    print(f"warning: {lack}; using the moments of inputs alone, a layer at a time", file=sys.stderr)
    return False
