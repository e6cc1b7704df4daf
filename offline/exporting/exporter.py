"""``milo export``: a MiLo checkpoint without compensators in, one of another tool with the same weights out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_milo.checkpoint import SCALE, MiLoFormat, U
from vllm_milo.head.layout import PLAIN_BITS
from vllm_milo.names import FUSED_LAYERS, split_expert_name
from vllm_milo.shards import TensorEntry, read_tensors
from vllm_milo.validation import is_fused_experts, quantized_modules, read_format, validate_checkpoint

from ..checkpoint.claim import Claim
from ..checkpoint.dequantize import DequantizedTensors
from ..checkpoint.writer import CheckpointWriter
from ..errors import ConversionError
from ..families.find import find_family
from ..progress import progress_bar
from .card import write_card
from .compressed import describe_format, export_matrix

FORMATS = ("compressed-tensors",)
"""What can be exported to."""
_ROUNDED = (
    "{count} of {total} matrices have scales that bfloat16 rounds; readers that load scales in the model's dtype have "
    "the same weights in float16 only"
)


class Exported(NamedTuple):
    """What was exported: where it is, the number of matrices, and what else there is to say."""

    out: Path
    matrices: int
    notes: list[str]


def export_checkpoint(source: Path, out: Path, command: str = "", progress: bool = False) -> Exported:
    """Write a checkpoint of compressed-tensors, ``pack-quantized``, with the codes, scales and zero points of a source.

    Args:
        source: folder of a MiLo checkpoint whose matrices all have rank 0 and integer zero points from 0 to 7.
        out: the new folder; it appears whole or not at all.
        command: that asked for it, for the card; empty where it was none.
        progress: show a progress bar.

    Raises:
        ConversionError, CheckpointError, ShardError: what the checkpoint holds has no place in that format, it is
            broken, or the output cannot be written.
    """
    if out.is_dir() and next(out.iterdir(), None) is not None:
        raise ConversionError(f"{out}: exists and is not empty; choose another output")
    with Claim(out, source) as claim:
        fmt = validate_checkpoint(source)
        tensors, (_, config) = read_tensors(source), read_format(source)
        modules = quantized_modules(tensors)
        _refuse_compensators(source, modules)
        _refuse_head(source, fmt)
        sizes = _group_sizes(modules, fmt)
        held = DequantizedTensors(source, fmt, torch.float32)
        rounded = 0
        with CheckpointWriter(out, source, claim=claim) as writer:
            for name in progress_bar(sorted(held.others), "copy", progress, unit="tensor"):
                writer.add(name, held.stored(name))
            for module in progress_bar(list(modules), "export", progress, unit="matrix"):
                found = held.packed(module)
                rounded += not torch.equal(found[SCALE].bfloat16().half(), found[SCALE])
                for leaf, tensor in export_matrix(module, found).items():
                    writer.add(f"{module}.{leaf}", tensor)
            family = find_family(config)
            ignore = [family.head, *_unquantized(tensors, modules, {family.embedding, f"{family.head}.weight"})]
            writer.seal({**config, "quantization_config": describe_format(sizes, ignore)}, {})
            write_card(writer.folder, source, command)
            published = writer.publish()
        notes = [_ROUNDED.format(count=rounded, total=len(modules))] if rounded else []
        return Exported(published, len(modules), [*claim.notes, *notes])


def _refuse_compensators(source: Path, modules: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    """Refuse a checkpoint some of whose matrices have a rank: other formats hold no compensators."""
    ranked = {name: found[U].shape[0] for name, found in modules.items() if U in found}
    if ranked:
        name, rank = next(iter(ranked.items()))
        raise ConversionError(
            f"{source}: {name} has a compensator of rank {rank}, as have {len(ranked)} of {len(modules)} matrices, and "
            f"compressed-tensors has none; quantize the original with --method rtn, hqq or mse and "
            f"--zero-points integer"
        )


def _refuse_head(source: Path, fmt: MiLoFormat) -> None:
    """Refuse a checkpoint whose output head is quantized: what is exported has one number of bits."""
    if fmt.lm_head_bits != PLAIN_BITS:
        raise ConversionError(
            f"{source}: stores lm_head in {fmt.lm_head_bits} bits, and `milo export` writes heads in 16; quantize the "
            f"original without --lm-head-bits"
        )


def _group_sizes(modules: Mapping[str, object], fmt: MiLoFormat) -> dict[str, int]:
    """Return the group sizes of linear layers by name, and those of routed experts by the pattern of their names.

    Raises:
        ConversionError: what vLLM computes as one layer has several.
    """
    fused: dict[str, dict[str, int]] = defaultdict(dict)
    sizes: dict[str, int] = {}
    for module in modules:
        size = fmt.module_group_size(module)
        fused[_fused_name(module)][module] = size
        expert = split_expert_name(module)
        sizes[module if expert is None else _pattern(expert[0])] = size
    for name, parts in fused.items():
        first, own = next(iter(parts.items()))
        other = next((part for part, size in parts.items() if size != own), None)
        if other is not None:
            raise ConversionError(
                f"{other}: has groups of {parts[other]}, but {first} groups of {own}, and compressed-tensors knows one "
                f"size for {name}, which is computed as one; quantize the original with --group-size"
            )
    return sizes


def _fused_name(module: str) -> str:
    """Return what vLLM calls the layer that a matrix becomes a part of."""
    expert = split_expert_name(module)
    if expert is not None:
        return expert[0]
    parent, dot, leaf = module.rpartition(".")
    return parent + dot + next((name for name, parts in FUSED_LAYERS.items() if leaf in parts), leaf)


def _pattern(experts: str) -> str:
    """Return the pattern of the names of all matrices of a layer's experts; it is searched for from the beginning."""
    return rf"re:{re.escape(experts)}\..*"


def _unquantized(tensors: Mapping[str, TensorEntry], modules: Mapping[str, object], known: set[str]) -> Iterator[str]:
    """Yield names of linear layers that are stored as they were, and patterns of such experts; not ``known`` ones."""
    found: dict[str, None] = {}
    for name, entry in tensors.items():
        module, _, leaf = name.rpartition(".")
        expert = split_expert_name(module)
        if is_fused_experts(name):
            found |= {module: None, _pattern(module): None}
        elif leaf == "weight" and len(entry.shape) == 2 and module not in modules and name not in known:
            found |= {module: None} if expert is None else {expert[0]: None, _pattern(expert[0]): None}
    yield from found
