"""How much of a calibration text is used, and for how many steps, where nobody says."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .calibration import memory
from .calibration.choose import PACKAGED, WINDOW
from .calibration.generated_text import OWN_TEXT
from .source.reader import ModelReader


class Effort(NamedTuple):
    """How much a device does by default: windows of calibration text, training steps, windows of a step."""

    windows: int
    steps: int
    batch: int


GPU_EFFORT = Effort(1000, 200, 8)
"""With more steps on as little as 256 windows the codes learn the text by heart: on real weights of 0.5 B parameters
100, 200 and 400 steps left a KL divergence of 0.082, 0.078 and 0.087 (2026-11-27). Models so wide that the states of
all windows would take more than some GiB get fewer."""
CPU_EFFORT = Effort(32, 16, 4)
OWN_WINDOWS = 512
"""Most windows that a model writes by itself where none are asked for: writing takes longer than learning."""
TUNE_STEPS = 2
"""Steps that train the whole model, for each step of a layer, at least."""
TUNE_PASSES = 3
"""Times that the whole model learns from each window of a text of the user's, at least."""
BEST_WINDOWS = 4000
"""Most windows of preset ``best`` on a GPU, and each is learned from at least once. On a real model of 0.5 B parameters
4000 windows, a quarter of them the packaged text and the others of the kinds that were scored, left a KL divergence of
0.0574 after its layers, where 1000 of the packaged text left 0.0676 and 256 others beside those 0.0621 (2026-11-27)."""


def effort_on(device: str) -> Effort:
    """Return the effort of a device."""
    return GPU_EFFORT if torch.device(device).type == "cuda" else CPU_EFFORT


def steps_of_pass(windows: int, effort: Effort) -> int:
    """Return the steps in which each window is learned from once."""
    return -(-windows // effort.batch)


def default_windows(reader: ModelReader, device: str, how: str = PACKAGED, thorough: bool = False) -> int:
    """Return how many windows a calibration has where none are asked for.

    Args:
        reader: the source model.
        device: where it is converted.
        how: what ``--calibration`` names.
        thorough: whether the preset takes more of a text.
    """
    effort = effort_on(device)
    most = BEST_WINDOWS if thorough and effort is GPU_EFFORT else effort.windows * (2 if thorough else 1)
    most = min(most, OWN_WINDOWS) if how == OWN_TEXT else most
    states = memory.DEFAULT_STATES * (2 if thorough else 1)
    return min(most, memory.windows_within(states, reader, WINDOW, device))
