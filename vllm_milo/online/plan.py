"""Decides, by a model's headers alone, what ``milo quantize --preset fast`` would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vllm_milo.checkpoint import MiLoFormat
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.errors import FamilyError
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.planning.plan import decide_format
from vllm_milo.offline.presets import PRESETS, milo_recipe
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.online.options import OnlineOptions


class OnlinePlan(NamedTuple):
    """What a model is quantized to while it is loaded.

    Attributes:
        format: ranks and groups by name, as a checkpoint would state them.
        recipe: of the solver.
        experts: names of the modules of routed experts.
        modules: names of the other matrices.
    """

    format: MiLoFormat
    recipe: Recipe
    experts: frozenset[str]
    modules: frozenset[str]


def find_files(model: str, revision: str | None) -> Path:
    """Return the folder of a model's files: itself, or where the Hub's cache has it, which downloads what it lacks.

    Args:
        model: a folder or the name of a repository.
        revision: of the repository.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def plan_online(folder: Path, options: OnlineOptions) -> OnlinePlan:
    """Return what a model is quantized to.

    Args:
        folder: of the model's files.
        options: the user's.

    Raises:
        ConversionError, CheckpointError, ShardError: this model cannot be converted, or not with these options.
    """
    try:
        reader = ModelReader(folder)
    except FamilyError as error:
        raise FamilyError(f"{error}; vLLM serves the model as it is without --quantization milo") from error
    rounds = {} if options.max_rounds is None else {"max_rounds": options.max_rounds}
    fast = PRESETS["fast"]
    conversion = Conversion(
        milo_recipe(False, group_size=options.group_size or fast.group_size, **rounds),
        budget_bits=options.budget_bits,
        serving_share=fast.serving_share,
        splittable=options.group_size is None,
        ignore=options.ignore,
    )
    fmt, recipe, held = decide_format(reader, conversion)
    experts = frozenset(matrix.experts for matrix in held if matrix.experts is not None)
    modules = frozenset(matrix.name for matrix in held if matrix.experts is None)
    return OnlinePlan(fmt, recipe, experts, modules)
