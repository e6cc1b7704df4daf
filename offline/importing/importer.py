"""``milo import``: a checkpoint of another tool in, a MiLo checkpoint with the same weights out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_milo.checkpoint import GROUP_SIZES, PACKED, SCALE, ZERO, CheckpointError, MiLoFormat
from vllm_milo.names import FUSED_LAYERS, find_key, split_expert_name
from vllm_milo.shards import TensorEntry
from vllm_milo.validation import count_experts, find_problems, first_problems, validate_checkpoint
from vllm_milo.values import shown
from vllm_milo.version import __version__

from ..checkpoint.card import CardNotes, write_card
from ..checkpoint.claim import Claim
from ..checkpoint.matrices import exceptions
from ..checkpoint.writer import CheckpointWriter
from ..errors import ConversionError
from ..families.family import Family
from ..families.find import find_family
from ..progress import progress_bar
from ..source.config import read_settings
from ..source.reader import FolderShards, SourceTensors
from .compressed import CompressedTensors
from .gptq import Gptq
from .grid import Format, Load, Size

FORMATS: dict[Any, Callable[[Mapping[str, Any], str], Format]] = {
    "gptq": Gptq,
    "compressed-tensors": CompressedTensors,
}
"""By ``quant_method`` of config.json."""


class Imported(NamedTuple):
    """What was imported: where it is, the number of matrices, from which format, and what else there is to say."""

    out: Path
    matrices: int
    title: str
    notes: list[str]


class _Source(NamedTuple):
    """A checkpoint of another tool: sizes of its quantized matrices, and the tensors of each by last name."""

    config: dict[str, Any]
    family: Family
    format: Format
    tensors: Mapping[str, TensorEntry]
    matrices: Mapping[str, Mapping[str, TensorEntry]]
    sizes: Mapping[str, Size]
    load: Load

    @property
    def others(self) -> list[str]:
        """Return the names of the tensors that are copied."""
        of_matrices = {f"{module}.{leaf}" for module, found in self.matrices.items() for leaf in found}
        return [name for name in self.tensors if name not in of_matrices]


def import_checkpoint(
    source: Path, out: Path, overwrite: bool = False, notes: CardNotes | None = None, progress: bool = False
) -> Imported:
    """Write the MiLo checkpoint that has the codes, scales and zero points of a source, after comparing all weights.

    Args:
        source: folder of a GPTQ or compressed-tensors checkpoint with 3-bit weights.
        out: the checkpoint's folder; it appears whole or not at all.
        overwrite: replace an existing MiLo checkpoint.
        notes: what its card says beside what the folders tell.
        progress: show a progress bar.

    Raises:
        ConversionError, CheckpointError, ShardError: what the source holds does not fit the MiLo format without loss,
            the source is broken, or the output cannot be written.
    """
    with Claim(out, source, overwrite) as claim:
        found = _open(source)
        fmt = _format(found)
        _refuse_what_breaks(found, fmt, source)
        with CheckpointWriter(out, source, overwrite, claim=claim) as writer:
            for name in progress_bar(found.others, "copy", progress, unit="tensor"):
                writer.add(name, found.load(name))
            for module in progress_bar(list(found.matrices), "import", progress, unit="matrix"):
                for leaf, tensor in _converted(found, module, fmt).items():
                    writer.add(f"{module}.{leaf}", tensor)
            writer.seal(found.config | {"quantization_config": fmt.to_dict()}, {})
            validate_checkpoint(writer.folder)
            write_card(writer.folder, source, notes or CardNotes())
            published = writer.publish()
        return Imported(published, len(found.matrices), found.format.title, claim.notes)


def _open(source: Path) -> _Source:
    """Read a source's headers, and plan what becomes of each tensor."""
    config = read_settings(source)
    form = _find_format(config.pop("quantization_config", None), source / "config.json")
    family, held = find_family(config), SourceTensors(config, (), FolderShards(source))
    tensors, load = held.view.tensors, held.load
    matrices: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in form.leaves:
            matrices[module][leaf] = entry
    if not matrices:
        raise ConversionError(f"{source}: holds no tensor named ….{form.needed[0]}, as {form.title} stores matrices")
    sizes = {}
    for module, found in matrices.items():
        missing = next((leaf for leaf in form.needed if leaf not in found), None)
        if missing is not None:
            raise ConversionError(f"{source}: {module}.{missing}: missing; are the model's files complete?")
        if family.kind(module) is None:
            raise ConversionError(
                f"{source}: {module}.{form.needed[0]}: is quantized, but vLLM takes this layer of {family.model_type} "
                f"from a MiLo checkpoint unquantized alone; quantize the original with `milo quantize`"
            )
        sizes[module] = form.size(module, found, load)
        _refuse_other_groups(f"{source}: {module}.{form.needed[1]}", sizes[module])
    return _Source(config, family, form, tensors, matrices, sizes, load)


def _refuse_other_groups(name: str, size: Size) -> None:
    """Refuse groups that differ in size, or that those of the MiLo format do not divide."""
    if size.k % size.groups or size.group_size not in GROUP_SIZES:
        raise ConversionError(
            f"{name}: has {size.groups} groups along {size.k} inputs, which MiLo's groups of "
            f"{', '.join(map(str, GROUP_SIZES))} do not divide; quantize the original with `milo quantize`"
        )


def _find_format(quantization: Any, path: Path) -> Format:
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method not in FORMATS:
        found = "no quantization_config" if quantization is None else f"quant_method {shown(method)}"
        raise ConversionError(
            f"{path}: has {found}; `milo import` takes 3-bit checkpoints of {' and '.join(FORMATS)}, and "
            f"`milo quantize` unquantized models"
        )
    return FORMATS[method](quantization, f"{path}: quantization_config")


def _format(source: _Source) -> MiLoFormat:
    """Return the format that holds a source's matrices.

    Raises:
        ConversionError: the experts of a layer differ in group size.
    """
    sizes = {module: size.group_size for module, size in source.sizes.items()}
    (default, _), *_ = Counter(sizes.values()).most_common()
    experts: dict[tuple[str, str], int] = {}
    for module, size in sizes.items():
        expert = split_expert_name(module)
        if expert is not None and experts.setdefault((expert[0], expert[2]), size) != size:
            raise ConversionError(f"{module}: has groups of {size}, other experts of its layer have other ones")
    return MiLoFormat(
        group_size=default,
        groups=exceptions(sizes, default),
        ignore=_ignore(source),
        recipe={"tool": f"vllm-milo {__version__}", "imported": source.format.title},
    )


def _ignore(source: _Source) -> tuple[str, ...]:
    """Return names and patterns of the layers that the source has unquantized."""
    family = source.family
    number = family.num_layers(family.settings(source.config))
    whole = dict.fromkeys(family.whole_pattern(name, number) for name in source.tensors)
    patterns = (*family.ignore, *(pattern for pattern in whole if pattern is not None))
    exact: dict[str, None] = {}
    for name in source.others:
        fused = family.fused_experts(name)
        module, _, leaf = family.checkpoint_name(name).rpartition(".")
        expert = split_expert_name(module)
        is_matrix = leaf == "weight" and len(source.tensors[name].shape) == 2 and ".layers." in module
        if fused is None and not is_matrix:
            continue
        kept = fused.experts if fused is not None else module if expert is None else expert[0]
        if find_key(patterns, kept) is None:
            exact[kept] = None
    return (*patterns, *exact)


def _refuse_what_breaks(source: _Source, fmt: MiLoFormat, folder: Path) -> None:
    """Refuse matrices that the format does not hold, before any is read."""
    planned = {name: source.tensors[name] for name in source.others}
    for module, size in source.sizes.items():
        group_size = fmt.module_group_size(module)
        file = next(iter(source.matrices[module].values())).file
        for leaf, (dtype, shape) in fmt.base_tensors(size.n, size.k, group_size).items():
            planned[f"{module}.{leaf}"] = TensorEntry(file, dtype, shape)
    problems = [*find_problems(planned, fmt, source.config), *_half_quantized(source)]
    stated = source.family.num_experts(source.family.settings(source.config))
    problems += [
        f"{name}: holds {count} experts, but config.json states {stated}"
        for name, count in count_experts(source.sizes).items()
        if count != stated
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: does not fit the MiLo format; quantize the original with `milo quantize`:\n  "
            + "\n  ".join(first_problems(problems))
        )


def _half_quantized(source: _Source) -> Iterator[str]:
    """Yield what is wrong with linear layers of which vLLM computes several as one, and only some are quantized."""
    unquantized = {name.removesuffix(".weight") for name in source.others if name.endswith(".weight")}
    for module in source.sizes:
        parent, _, leaf = module.rpartition(".")
        group = next((parts for parts in FUSED_LAYERS.values() if leaf in parts), [])
        other = next((name for part in group if (name := f"{parent}.{part}") in unquantized), None)
        if other is not None:
            yield f"{module}: is quantized, but {other}, which vLLM computes with it, is not"


def _converted(source: _Source, module: str, fmt: MiLoFormat) -> dict[str, torch.Tensor]:
    """Return the tensors that a matrix becomes, by last name."""
    tensors = {leaf: source.load(f"{module}.{leaf}") for leaf in source.matrices[module]}
    grid = source.format.read(module, tensors, source.sizes[module])
    scales = f"{module}.{'scales' if 'scales' in tensors else 'weight_scale'}"
    return dict(zip((PACKED, SCALE, ZERO), grid.stored(scales, fmt.module_group_size(module)), strict=True))
