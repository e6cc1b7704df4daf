"""What ``milo quantize --dry-run`` says of a plan: as JSON for machines, and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_milo.values import size_text

from ..calibration import memory
from ..checkpoint.inspect import describe_head
from ..served.load import Held, held_by, resident_bits, serving_line, serving_load
from ..source.config import chosen_experts
from .disk import free_bytes
from .plan import Plan


def describe(plan: Plan) -> dict[str, Any]:
    """Return what ``--dry-run --json`` prints.

    ``bytes`` counts all tensors, ``disk_bytes`` all files, ``disk_peak_bytes`` these and what is on the disk twice on
    the way, at most; ``quantized_bytes`` codes, scales, zero points and factors.
    ``exact`` is false where ranks take a pass over the weights: sizes are then as if all experts had the same kurtosis;
    or the calibration text: ranks are then those by kind, and sizes may grow up to the budget.
    ``kept`` counts the matrices that ``--ignore`` keeps as they are, and names the experts' modules among them;
    ``bits_per_weight`` is of quantized weights alone, ``bits_per_weight_with_kept`` of these too,
    ``resident_bits_per_weight`` of quantized weights as the kernels hold them on one GPU, and
    ``resident_bits_dense_16bit`` where dense layers are kept in 16 bits and 8. ``serving`` is what one
    decoded token takes of these (:class:`..served.load.Load`), null where config.json does not say how many experts a
    token reads; ``serving_target`` is the most that its share may be, null for no limit.
    ``lm_head`` has bits, weights and bytes of an output head that is quantized, which no other number of bits counts;
    it is null where it is copied.
    ``memory`` is the most that the conversion takes, in bytes, on the device (0 for the CPU) and on the host.
    ``layout`` says where the hidden states of a text lie (``device``, ``host`` or ``disk``), in how many rounds experts
    are trained, and how many devices hold what is trained of them.
    ``source_format`` says what the model's matrices are stored as, null where all are in 16 bits or more.
    ``calibration`` holds the most windows and tokens that the text is cut into; it is not read.
    """
    fmt, need, device = plan.format(), plan.memory, plan.conversion.device
    held = held_by(plan.matrices, plan.ranks, plan.conversion.recipe)
    return {
        "model": str(plan.reader.folder),
        "output": str(plan.out),
        "family": plan.reader.family.model_type,
        "source_format": plan.reader.source.view.format,
        "matrices": len(plan.matrices),
        "by_kind": _by_kind(plan),
        "quantized_weights": plan.weights,
        "bits_per_weight": plan.bits_per_weight,
        "resident_bits_per_weight": resident_bits(held),
        "resident_bits_dense_16bit": resident_bits(held, dense_wide=True),
        "serving": _serving(plan, held),
        "serving_target": plan.conversion.serving_share,
        "bits_per_weight_with_kept": plan.kept.bits_with(plan.weights, plan.quantized_bytes),
        "kept": plan.kept.to_dict(),
        "lm_head": describe_head(plan.tensors, fmt.lm_head_bits),
        "exact": plan.exact and not plan.conversion.measures_ranks,
        "bytes": plan.tensor_bytes,
        "quantized_bytes": plan.quantized_bytes,
        "companion_bytes": plan.companions.size,
        "companions": sorted(plan.companions.files),
        "disk_bytes": plan.disk_bytes,
        "disk_peak_bytes": plan.peak_disk_bytes,
        "disk_free": free_bytes(plan.out),
        "memory": {"device": need.device, "host": need.host},
        "memory_free": {"device": memory.available(device) if need.device else 0, "host": memory.available("cpu")},
        "layout": plan.layout._asdict(),
        "tensor_parallel_sizes": plan.splits,
        "calibration": _calibration(plan),
        "format": fmt.to_dict(),
        "warnings": plan.warnings,
    }


def format_description(plan: Plan) -> str:
    """Return the text that ``--dry-run`` prints."""
    said = describe(plan)
    about = "" if said["exact"] else "about "
    free = f"; {size_text(said['disk_free'])} free" if said["disk_free"] is not None else ""
    fits = f" (up to {size_text(said['disk_peak_bytes'])} on the way{free})"
    lines = [
        f"model            {said['model']} ({said['family']}), {said['matrices']} matrices to quantize",
        f"output           {said['output']}: {about}{size_text(said['disk_bytes'])} on disk{fits}",
        f"bits a weight    {about}{said['bits_per_weight']:.3f} (codes, scales, zero points and factors), "
        f"{about}{said['resident_bits_per_weight']:.3f} on a GPU, "
        f"{about}{said['resident_bits_dense_16bit']:.3f} with dense layers in 16 bits and 8",
    ]
    if said["serving"] is not None:
        most = "" if said["serving_target"] is None else f" (at most {said['serving_target']:g})"
        lines.append(f"serving          {serving_line(said['serving'], about)}{most}")
    if said["source_format"] is not None:
        lines.insert(1, f"stored as        {said['source_format']}; becomes {str(plan.reader.dtype)[6:]} as it is read")
    for kind, row in said["by_kind"].items():
        groups = " and ".join(row["group_sizes"])
        lines.append(
            f"  {kind:<15}{row['matrices']} matrices, groups of {groups}, rank {about}{row['min_rank']} to "
            f"{row['max_rank']}, mean {row['mean_rank']:.1f}"
        )
    if plan.kept.matrices:
        lines.append(_kept_line(plan, about))
    if (head := said["lm_head"]) is not None:
        lines.append(
            f"lm_head          {size_text(head['bytes'])} for {head['weights']:,} weights in {head['bits']} bits, "
            f"which the bits a weight do not count"
        )
    lines.append(plan.memory.line(plan.conversion.device).replace("memory: ", f"{'memory':<17}"))
    lines += [f"{'':<17}{line}"] if (line := plan.layout.line()) else []
    text = said["calibration"]
    if text is not None:
        most = f"up to {text['windows']} windows, {text['tokens']} tokens"
        lines.append(f"calibration      {text['name']}: {most}; not cut yet")
    sizes = ", ".join(map(str, said["tensor_parallel_sizes"]))
    lines.append(f"tensor parallel  {sizes}")
    return "\n".join(lines)


def _serving(plan: Plan, held: Sequence[Held]) -> dict[str, Any] | None:
    top_k = chosen_experts(plan.reader.config)
    if top_k is None:
        return None
    return serving_load(held, top_k).to_dict()


def group_notes(plan: Plan) -> list[str]:
    """Return which matrices get smaller groups than the recipe's, and why."""
    matrices, recipe = plan.matrices, plan.conversion.recipe
    odd = [matrix for matrix in matrices if recipe.group_size_for(matrix.k) != recipe.group_size]
    lines = []
    for size, chosen in sorted({(recipe.group_size_for(m.k), m.k in dict(recipe.narrow)) for m in odd}, reverse=True):
        theirs = [m.k for m in odd if recipe.group_size_for(m.k) == size and (m.k in dict(recipe.narrow)) == chosen]
        inputs = ", ".join(map(str, sorted(set(theirs))))
        why = (
            f"tensor parallelism could not cut those of {recipe.group_size}"
            if chosen
            else f"{recipe.group_size} does not divide their input size"
        )
        lines.append(f"{len(theirs)} of {len(matrices)} matrices get groups of {size} weights: {why} ({inputs})")
    return lines


def _by_kind(plan: Plan) -> dict[str, dict[str, Any]]:
    fmt, found = plan.format(), {}
    for kind in sorted({matrix.kind for matrix in plan.matrices}):
        matrices = [matrix for matrix in plan.matrices if matrix.kind == kind]
        ranks = [plan.ranks[matrix.name] for matrix in matrices]
        sizes: Mapping[int, int] = Counter(fmt.module_group_size(matrix.name) for matrix in matrices)
        found[str(kind)] = {
            "matrices": len(matrices),
            "group_sizes": {str(size): sizes[size] for size in sorted(sizes, reverse=True)},
            "min_rank": min(ranks),
            "max_rank": max(ranks),
            "mean_rank": sum(ranks) / len(ranks),
        }
    return found


def _kept_line(plan: Plan, about: str) -> str:
    """Return the line of what ``--ignore`` keeps."""
    kept = plan.kept
    number = f"{len(kept.experts)} layer{'s' if len(kept.experts) > 1 else ''}"
    layers = f", all routed experts of {number} among them" if kept.experts else ""
    bits = kept.bits_with(plan.weights, plan.quantized_bytes)
    return (
        f"kept             {len(kept.matrices)} matrices as they are (--ignore){layers}: {size_text(kept.bytes)}; "
        f"{about}{bits:.3f} bits a weight with them"
    )


def _calibration(plan: Plan) -> dict[str, Any] | None:
    text = plan.conversion.text
    if text is None:
        return None
    return {"name": text.name, "windows": len(text.windows), "tokens": text.windows.numel()}
