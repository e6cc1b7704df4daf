"""What a MiLo checkpoint holds: sizes, bits a weight, ranks, recorded errors. Reads headers only."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_milo.checkpoint import BASE_TENSORS, FACTOR_TENSORS, MiLoFormat
from vllm_milo.dtypes import DTYPES
from vllm_milo.head.layout import head_shape, quantized_heads
from vllm_milo.names import split_expert_name
from vllm_milo.shards import ShardError, TensorEntry, read_object, read_tensors
from vllm_milo.validation import (
    count_experts,
    matrix_shape,
    module_rank,
    quantized_modules,
    read_format,
    validate_checkpoint,
)
from vllm_milo.values import shown_name, size_text

from ..families.family import Family
from ..families.find import find_family
from ..nouns import Kind, Matrix
from ..served.load import Held, Load, resident_bits, serving_line, serving_load
from ..source.config import check_numbers, chosen_experts
from .report import REPORT_NAME


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Return what ``milo inspect --json`` prints, after validating the checkpoint.

    ``group_sizes`` is the number of matrices by their group size, the most frequent first. ``bits_per_weight`` counts
    codes, scales, zero points and factors over the quantized matrices; ``bytes`` is all tensors of the checkpoint,
    ``quantized_bytes`` those of quantized matrices. ``kept_weights`` and ``kept_bytes`` are of the matrices that could
    be quantized and are not, because ``ignore`` names them; ``bits_per_weight_with_kept`` counts them too.
    ``resident_bits_per_weight`` is of the quantized matrices as the kernels hold them on one GPU,
    ``resident_bits_dense_16bit`` where dense layers are kept in 16 bits and 8; ``serving`` what one
    decoded token takes of them (:class:`..served.load.Load`), null where config.json does not say how many experts a
    token reads. ``lm_head``
    has bits, weights and bytes of the output head, which none of these counts; null where it is tied to the embeddings.

    Raises:
        CheckpointError, ShardError: the folder is no valid MiLo checkpoint.
    """
    validate_checkpoint(folder)
    fmt, config = read_format(folder)
    check_numbers(config, folder / "config.json")
    tensors = read_tensors(folder)
    modules = quantized_modules(tensors)
    weights = sum(math.prod(matrix_shape(found)) for found in modules.values())
    base = sum(_bytes(found, BASE_TENSORS) for found in modules.values())
    factors = sum(_bytes(found, FACTOR_TENSORS) for found in modules.values())
    family = find_family(config)
    number = family.num_layers(family.settings(config))
    kept = [entry for name, entry in tensors.items() if _is_kept(name, modules, family, number)]
    kept_weights, kept_bytes = sum(math.prod(entry.shape) for entry in kept), sum(map(_tensor_bytes, kept))
    errors = _recorded_errors(folder)
    ranks = _ranks(modules, fmt)
    held = [_held(name, found, ranks[name], fmt, family) for name, found in modules.items()]
    load = _load(held, chosen_experts(family.settings(config)))
    return {
        "format_version": fmt.to_dict()["format_version"],
        "group_size": fmt.group_size,
        "group_sizes": _group_sizes(modules, fmt),
        "compensator_bits": fmt.compensator.bits,
        "recipe": dict(fmt.recipe),
        "quantized_weights": weights,
        "bits_per_weight": 8 * (base + factors) / weights,
        "resident_bits_per_weight": resident_bits(held),
        "resident_bits_dense_16bit": resident_bits(held, dense_wide=True),
        "serving": None if load is None else load.to_dict(),
        "kept_weights": kept_weights,
        "kept_bytes": kept_bytes,
        "lm_head": _head(tensors, family, fmt),
        "bits_per_weight_with_kept": 8 * (base + factors + kept_bytes) / (weights + kept_weights),
        "bytes": sum(_tensor_bytes(entry) for entry in tensors.values()),
        "quantized_bytes": base + factors,
        "factor_bytes": factors,
        "ranks": _by_kind(modules, {m: float(r) for m, r in ranks.items()}, config),
        "relative_error": _by_kind(modules, errors, config) if errors else None,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Return the text that ``milo inspect`` prints."""
    lines = [
        f"3-bit, {name_group_sizes(report)}, compensators in {report['compensator_bits']} bits",
        f"recipe           {report['recipe']}",
        f"all tensors      {size_text(report['bytes'])}",
        f"quantized        {size_text(report['quantized_bytes'])} for {report['quantized_weights']:,} weights",
        f"  compensators   {size_text(report['factor_bytes'])}",
        f"bits a weight    {report['bits_per_weight']:.3f} (codes, scales, zero points and factors), "
        f"{report['resident_bits_per_weight']:.3f} on a GPU, "
        f"{report['resident_bits_dense_16bit']:.3f} with dense layers in 16 bits and 8",
    ]
    if report["serving"] is not None:
        lines.append(f"serving          {serving_line(report['serving'])}")
    if report["kept_weights"]:
        lines.append(
            f"kept as they are {size_text(report['kept_bytes'])} for {report['kept_weights']:,} weights (ignore); "
            f"{report['bits_per_weight_with_kept']:.3f} bits a weight with them"
        )
    if report["lm_head"] is not None:
        head = report["lm_head"]
        lines.append(
            f"lm_head          {size_text(head['bytes'])} for {head['weights']:,} weights in {head['bits']} bits, "
            f"which the bits a weight do not count"
        )
    for title, table in (("rank", report["ranks"]), ("relative error", report["relative_error"])):
        for kind, row in (table or {}).items():
            lines.append(
                f"{title:<16} {kind:<15} mean {row['mean']:.4g}  min {row['min']:.4g}  max {row['max']:.4g}"
                f"  ({row['matrices']} matrices)"
            )
    return "\n".join(lines)


def describe_head(tensors: Mapping[str, TensorEntry], bits: int) -> dict[str, Any] | None:
    """Return bits, weights and bytes of the quantized head among some tensors; None where there is none."""
    for found in quantized_heads(tensors).values():
        size = sum(map(_tensor_bytes, found.values()))
        return {"bits": bits, "weights": math.prod(head_shape(found, bits)), "bytes": size}
    return None


def name_group_sizes(report: Mapping[str, Any]) -> str:
    """Return the group sizes of a report: ``group size 128``, or each with its number of matrices."""
    counts = [f"{size} ({count} matrices)" for size, count in report["group_sizes"].items()]
    return f"group size {report['group_size']}" if len(counts) == 1 else f"group sizes {' and '.join(counts)}"


def _head(tensors: Mapping[str, TensorEntry], family: Family, fmt: MiLoFormat) -> dict[str, Any] | None:
    """Return bits, weights and bytes of the output head; None where it has no tensor of its own."""
    if (quantized := describe_head(tensors, fmt.lm_head_bits)) is not None:
        return quantized
    entry = tensors.get(f"{family.head}.weight")
    if entry is None:
        return None
    return {"bits": 8 * DTYPES[entry.dtype].size, "weights": math.prod(entry.shape), "bytes": _tensor_bytes(entry)}


def _is_kept(tensor: str, modules: Mapping[str, Any], family: Family, layers: int | None) -> bool:
    """Return whether a tensor holds matrices that could be quantized and are not."""
    if family.whole_pattern(tensor, layers) is not None:
        return False
    module, _, leaf = tensor.rpartition(".")
    if family.fused_experts(tensor) is not None:
        return True
    return leaf == "weight" and family.kind(module) is not None and module not in modules


def _group_sizes(modules: Iterable[str], fmt: MiLoFormat) -> dict[str, int]:
    counts = Counter(fmt.module_group_size(name) for name in modules)
    return {str(size): count for size, count in counts.most_common()}


def _ranks(modules: Mapping[str, Mapping[str, TensorEntry]], fmt: Any) -> dict[str, int]:
    experts = count_experts(modules)
    return {name: module_rank(name, fmt, experts) for name in modules}


def _held(name: str, found: Mapping[str, TensorEntry], rank: int, fmt: MiLoFormat, family: Family) -> Held:
    """Return a matrix as it is stored; one that the family does not know counts as read by every token."""
    experts, number, _ = split_expert_name(name) or (None, None, "")
    kind = family.kind(name) or (Kind.ATTENTION if experts is None else Kind.ROUTED_EXPERT)
    matrix = Matrix(name, kind, *matrix_shape(found), experts, number)
    return Held(matrix, rank, fmt.module_group_size(name), fmt.compensator.bits)


def _load(held: Sequence[Held], top_k: int | None) -> Load | None:
    return None if top_k is None else serving_load(held, top_k)


def _by_kind(
    modules: Mapping[str, Any], values: Mapping[str, float], config: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    family = find_family(config)
    kinds: dict[str, list[float]] = defaultdict(list)
    for name in modules:
        if name in values:
            kinds[str(family.kind(name))].append(values[name])
    return {
        kind: {"matrices": len(found), "mean": sum(found) / len(found), "min": min(found), "max": max(found)}
        for kind, found in sorted(kinds.items())
    }


def _recorded_errors(folder: Path) -> dict[str, float]:
    path = folder / REPORT_NAME
    if not path.exists():
        return {}
    matrices = read_object(path).get("matrices")
    entries = matrices.items() if isinstance(matrices, dict) else [("matrices", None)]
    found = {name: entry.get("error") if isinstance(entry, dict) else None for name, entry in entries}
    for name, error in found.items():
        if not isinstance(error, float | int) or not 0 <= error < math.inf:
            raise ShardError(f"{path}: states no error of {shown_name(name)}; copy it again, or remove it")
    return {name: float(error) for name, error in found.items() if error is not None}


def _bytes(found: Mapping[str, TensorEntry], names: tuple[str, ...]) -> int:
    return sum(_tensor_bytes(found[name]) for name in names if name in found)


def _tensor_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * DTYPES[entry.dtype].size
