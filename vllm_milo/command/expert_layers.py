"""The shapes of a model's routed experts as one process of a tensor-parallel group serves them, by headers alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_milo.checkpoint import CheckpointError, MiLoFormat
from vllm_milo.kernels.serving.padding import padded
from vllm_milo.kernels.weights import MoEShape, largest_rank
from vllm_milo.names import EXPERT_PROJECTIONS, split_expert_name
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.families.find import find_family
from vllm_milo.offline.planning.plan import decide_format
from vllm_milo.offline.presets import DEFAULT_PRESET, PRESETS, Preset, milo_recipe
from vllm_milo.offline.source.config import CHOSEN_KEYS, chosen_experts
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.shards import read_object, read_tensors
from vllm_milo.validation import matrix_shape, quantized_modules, validate_checkpoint


class ExpertMatrix(NamedTuple):
    """A routed expert's matrix: the name of its layer's experts, its number, its projection and its shape."""

    experts: str
    number: int
    projection: str
    n: int
    k: int


PLANNED = tuple(name for name, preset in PRESETS.items() if preset.budget_bits is not None)
"""Presets whose ranks and groups follow from a source model's headers."""


def expert_shapes(folder: Path, tensor_parallel: int = 1, preset: str = DEFAULT_PRESET) -> dict[MoEShape, int]:
    """Return how many layers have routed experts of each shape, the most frequent first.

    Args:
        folder: of a MiLo checkpoint, or of a source model, whose headers decide ranks.
        tensor_parallel: processes that share each expert.
        preset: of :data:`PLANNED`, that makes a checkpoint of a source model.

    Raises:
        CheckpointError, ConversionError, ShardError: the model cannot be read or converted, or not be split like this.
    """
    config = read_object(folder / "config.json")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "milo":
        fmt = validate_checkpoint(folder)
        modules = quantized_modules(read_tensors(folder))
        matrices = list(_of_modules({name: matrix_shape(found) for name, found in modules.items()}))
    else:
        fmt, matrices = _planned(folder, PRESETS[preset])
    top_k = _top_k(folder, config)
    layers: dict[str, list[ExpertMatrix]] = defaultdict(list)
    for matrix in matrices:
        layers[matrix.experts].append(matrix)
    if not layers:
        raise CheckpointError(f"{folder}: no layer has routed experts in 3 bits; there are no tiles to tune")
    counts = Counter(_shape(name, held, fmt, top_k, tensor_parallel) for name, held in layers.items())
    return dict(counts.most_common())


def _of_modules(shapes: Mapping[str, tuple[int, int]]) -> Iterable[ExpertMatrix]:
    for name, (n, k) in shapes.items():
        if expert := split_expert_name(name):
            yield ExpertMatrix(*expert, n, k)


def _planned(folder: Path, preset: Preset) -> tuple[MiLoFormat, list[ExpertMatrix]]:
    """Return what a preset makes of a source model before it measures ranks."""
    recipe = milo_recipe(False, group_size=preset.groups(preset.calibrated, None))
    conversion = Conversion(recipe, budget_bits=preset.budget_bits, serving_share=preset.serving_share, splittable=True)
    fmt, _, matrices = decide_format(ModelReader(folder), conversion)
    return fmt, list(_of_modules({matrix.name: (matrix.n, matrix.k) for matrix in matrices}))


def _top_k(folder: Path, config: Mapping[str, Any]) -> int:
    """Return the experts of a token."""
    found = chosen_experts(find_family(config).settings(config))
    if found is not None:
        return found
    raise ConversionError(
        f"{folder / 'config.json'}: states no number of experts of a token; one of {', '.join(CHOSEN_KEYS)} must"
    )


def _shape(name: str, matrices: Iterable[ExpertMatrix], fmt: MiLoFormat, top_k: int, tensor_parallel: int) -> MoEShape:
    """Return the shape of a layer's experts in one process."""
    roles = {EXPERT_PROJECTIONS[matrix.projection]: matrix for matrix in matrices}
    experts = 1 + max(matrix.number for matrix in matrices)
    up, down = roles["up"], roles["down"]
    groups = tuple(fmt.groups.of_experts(name, matrix.projection, fmt.group_size) for matrix in (up, down))
    ranks = {role: fmt.ranks.of_experts(name, matrix.projection, experts) for role, matrix in roles.items()}
    read = [ranks[role] for role in ("gate", "up") if role in ranks]
    _check_split(name, up.n, groups[1], any(map(any, ranks.values())), fmt, tensor_parallel)
    share = up.n // tensor_parallel
    return MoEShape(
        experts,
        min(top_k, experts),
        padded(up.k),
        padded(share),
        (groups[0], groups[1]),
        (largest_rank(zip(*read, strict=True)), largest_rank([r] for r in ranks["down"])),
        len(read),
    )


def _check_split(name: str, size: int, group: int, has_rank: bool, fmt: MiLoFormat, parts: int) -> None:
    of_n, of_k = fmt.compensator.split_multiples(group, has_rank)
    if size % parts or any(size // parts % multiple for multiple in (of_n, of_k) if parts > 1):
        raise ConversionError(
            f"{name}: an intermediate size of {size} in groups of {group} cannot be split over {parts} processes; "
            f"give --tensor-parallel another number (`milo quantize --dry-run` prints those that work)"
        )
