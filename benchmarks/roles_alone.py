"""KL divergence from the original model where one role alone is quantized: which roles a method harms, and by how much.

    python -m benchmarks.roles_alone MODEL --text FILE [FILE ...] -o OUT [--device cuda] [--roles k v] [--only fast]

A role is one projection of attention (q, k, v, o) or the gate, up or down projections of the routed experts, the shared
experts or the dense FFNs, in all layers; everything else keeps the original's weights. ``milo quantize --ignore``
cannot do that, since it refuses routed experts and parts of layers that vLLM fuses; so the converter's functions
quantize here, and no checkpoint is written.

The contenders store a role in at most the bits that HQQ takes with groups of 64, which are 3.5 where 64 divides the
inputs: ``fast`` and ``balanced`` are ``milo quantize``'s with that as ``--budget-bits``, in place of their 3.6, and
choose their ranks within it. ``paper`` is the paper's loop with the groups and the ranks of these two, for with its own
groups of 64 nothing would be left for ranks. What a budget does not pay for is not spent: the bits are in the table. A
role alone has the whole budget for itself, so its ranks are not those that it gets in a whole model.

Each text gives windows from its start, which no contender may have been calibrated on. A difference between contenders
comes with its standard error over the windows, which all of them are measured on. Activations are float32 by default:
one role changes so little that bfloat16 would hide some of it. Writes OUT/roles-alone.json after each row, prints a
table, and lists where ``fast`` or ``balanced`` is worse than HQQ or the paper's loop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.divergence import HQQ, add_arguments, record
from benchmarks.records import markdown_table, write_json
from vllm_milo.names import leaf_of
from vllm_milo.offline.batches import batch_elements
from vllm_milo.offline.bench import Bench
from vllm_milo.offline.checkpoint.report import Report
from vllm_milo.offline.cli import quantize
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import quantize_layers
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.divergence import divergences, open_streamed, text_windows
from vllm_milo.offline.families.family import Family
from vllm_milo.offline.nouns import Kind, Matrix
from vllm_milo.offline.ranks.budget import least_bits, stored_bits
from vllm_milo.offline.ranks.plan import Pass, RankChoice, plan_ranks
from vllm_milo.offline.source.layers import Layer, Source
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, Tensors
from vllm_milo.offline.spread.devices import Devices

PAPER, FAST, BALANCED = "paper", "fast", "balanced"
OPTIONS = {
    HQQ: ["--method", "hqq"],
    PAPER: ["--method", "paper", "--group-size", "128"],
    FAST: ["--preset", "fast"],
    BALANCED: [],
}
"""Of ``milo quantize``, by contender; all but HQQ get a budget in place of ranks."""
OURS, RIVALS = (FAST, BALANCED), (HQQ, PAPER)
FILE_NAME = "roles-alone.json"
_FFNS = {Kind.SHARED_EXPERT: "shared", Kind.ROUTED_EXPERT: "routed", Kind.DENSE_FFN: "dense"}
_ORDER = [*"qkvo", *(f"{ffn}-{part}" for ffn in _FFNS.values() for part in ("gate", "up", "down"))]


class Loss(NamedTuple):
    """A text on which a contender of ours is worse than a rival.

    Attributes:
        role: that is quantized.
        ours: the contender that is worse.
        rival: the contender that is better.
        text: name of the text.
        kl: KL divergences of the two.
        bits: stored bits a weight of the two.
        error: standard error of the difference over the windows, or None where there is one window.
    """

    role: str
    ours: str
    rival: str
    text: str
    kl: tuple[float, float]
    bits: tuple[float, float]
    error: float | None

    def line(self) -> str:
        """Return the item of the list."""
        error = "" if self.error is None else f" ± {self.error:.5f}"
        return (
            f"- {self.role}, {self.text}: `{self.ours}` {self.kl[0]:.5f} at {self.bits[0]:.3f} bits, {self.rival} "
            f"{self.kl[1]:.5f} at {self.bits[1]:.3f}; worse by {self.kl[0] - self.kl[1]:.5f}{error}"
        )


def main() -> None:
    """Run the contenders on the roles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, dtype="float32")
    parser.add_argument("--roles", nargs="+", metavar="ROLE", help="default: all that the model has, as in the table")
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), help="contenders beside HQQ")
    arguments = parser.parse_args()
    try:
        _run(arguments)
    except ConversionError as error:
        raise SystemExit(f"roles_alone: {error}") from error


def _run(arguments: argparse.Namespace) -> None:
    reader = ModelReader(arguments.model)
    found = find_roles(reader)
    roles = arguments.roles or list(found)
    unknown = sorted(set(roles) - set(found))
    if unknown:
        raise ConversionError(f"--roles: the model has no {', '.join(unknown)}; it has {', '.join(found)}")
    names = [HQQ, *(name for name in OPTIONS if name in arguments.only and name != HQQ)]
    hqq = conversion_of(HQQ, arguments.model, arguments.device).recipe
    texts = {
        text.name: text_windows(arguments.model, arguments.model, text, 512, arguments.max_windows)
        for text in arguments.text
    }
    rows: list[dict[str, Any]] = []
    content = record(arguments, rows)
    for role in roles:
        budget = least_bits(found[role], hqq)
        for name in names:
            conversion = conversion_of(name, arguments.model, arguments.device, budget)
            rows.append({"role": role, "name": name, **run(reader, found[role], conversion, budget, texts, arguments)})
            first = next(row for row in rows if row["role"] == role)
            rows[-1]["share"] = 1 - rows[-1]["mean_kl"] / first["mean_kl"] if first["mean_kl"] else 0.0
            write_json(arguments.output / FILE_NAME, content)  # each at once: the next may take an hour
            print(f"{role}, {name}: KL {rows[-1]['mean_kl']:.5f}", file=sys.stderr, flush=True)
        print(table(rows, list(texts)), flush=True)
    print("\n" + describe_losses(losses(rows)))


def role_of(family: Family, matrix: Matrix) -> str:
    """Return the role of a matrix: ``q``, or ``routed-down``."""
    leaf = leaf_of(matrix.name)
    return leaf.removesuffix("_proj") if matrix.kind is Kind.ATTENTION else f"{_FFNS[matrix.kind]}-{family.role(leaf)}"


def find_roles(reader: ModelReader) -> dict[str, list[Matrix]]:
    """Return the matrices of each role that a model has."""
    found: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in reader.matrices:
        found[role_of(reader.family, matrix)].append(matrix)
    others = [role for role in found if role not in _ORDER]
    return {role: found[role] for role in [*_ORDER, *others] if role in found}


def conversion_of(name: str, model: Path, device: str, budget: float | None = None) -> Conversion:
    """Return what ``milo quantize`` does by a contender's options, with its calibration text.

    A preset has the groups that there is room for within ``budget``, stored bits of a weight.
    """
    parser = argparse.ArgumentParser()
    quantize.add_parser(parser.add_subparsers())
    always = ["quantize", str(model), "-o", "nowhere", "--device", device, "--quiet"]
    within = [] if budget is None or name not in (FAST, BALANCED) else ["--budget-bits", str(budget)]
    return quantize.decide_conversion(parser.parse_args([*always, *OPTIONS[name], *within]))


def run(
    reader: ModelReader,
    matrices: Sequence[Matrix],
    conversion: Conversion,
    budget: float,
    texts: Mapping[str, torch.Tensor],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return what a contender makes of the matrices of one role.

    Args:
        reader: the model.
        matrices: of the role.
        conversion: of the contender, whose own ranks or budget do not count.
        budget: most stored bits of a weight.
        texts: windows by the texts' names.
        arguments: device and dtype of the measurement.
    """
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    start = time.monotonic()
    plan, ranks = plan_role(reader, matrices, conversion, budget)
    by_kind = replace(conversion, measure_ranks=False)  # there is one role, with its own budget
    bench = Bench(reader, Devices([device]), batch_elements(device), Report(), progress=False)
    layers = quantize_layers(bench, plan, ranks, by_kind)
    values = {matrix: one.to(device).dequantize().to("cpu", dtype) for _, solved in layers for matrix, one in solved}
    seconds = time.monotonic() - start
    scores = measure(with_matrices(reader, values, device, dtype), reader.folder, texts)
    return {
        "bits": stored_bits(matrices, ranks, conversion.recipe),
        "mean_rank": sum(ranks.values()) / len(ranks),
        "weights": sum(matrix.n * matrix.k for matrix in matrices),
        "seconds": seconds,
        "mean_kl": sum(one["kl"] for one in scores.values()) / len(scores),
        "texts": scores,
    }


def plan_role(
    reader: ModelReader, matrices: Sequence[Matrix], conversion: Conversion, budget: float
) -> tuple[list[Layer], dict[str, int]]:
    """Return the layers with the role's matrices alone, and the ranks of these within a budget; none for HQQ.

    Raises:
        ConversionError: the budget does not even pay for the codes, scales and zero points.
    """
    chosen = set(matrices)
    plan = [Layer(one.name, [of for of in one.matrices if of.matrix in chosen], one.others) for one in reader.layers]
    if conversion.recipe.method == "hqq":
        return plan, {matrix.name: 0 for matrix in matrices}
    over = Pass(reader, plan, torch.device(conversion.device), progress=False)
    return plan, plan_ranks(over, RankChoice((), budget, {}), conversion.recipe)[0]


def with_matrices(
    reader: ModelReader, values: Mapping[Matrix, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> StreamedModel:
    """Return a model with other values [N, K] of some of its matrices; fused experts are parted where that must be."""
    sources: dict[str, list[Source]] = defaultdict(list)
    for layer in reader.layers:
        for source in layer.matrices:
            sources[source.tensor].append(source)

    def load(prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in reader.tensors:
            if tensor.startswith(prefix):
                yield from of_tensor(tensor)

    def of_tensor(tensor: str) -> Tensors:
        held = sources[tensor]
        if not any(source.matrix in values for source in held):
            return [(tensor, reader.load(tensor))]
        if all(source.matrix in values for source in held):
            return [(f"{source.matrix.name}.weight", values[source.matrix]) for source in held]
        whole = reader.load(tensor)  # fused experts, of which one projection is replaced
        found = [(source, values.get(source.matrix, whole[source.expert, source.rows])) for source in held]
        return [(f"{source.matrix.name}.weight", part) for source, part in found]

    return StreamedModel(reader.folder, reader.family, load, device, dtype)


def measure(model: StreamedModel, reference: Path, texts: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Return how far a model is from its reference on each text, and the KL divergence of each window."""
    windows = [window for text in texts.values() for window in text.split(1)]
    found = iter(divergences(model, open_streamed(reference, model.device, model.dtype), windows))
    scores = {}
    for name, text in texts.items():
        own = [next(found) for _ in text]
        flips = [one.router_flips for one in own if one.router_flips is not None]
        scores[name] = {
            "kl": statistics.fmean(one.kl for one in own),
            "top1": statistics.fmean(one.top1 for one in own),
            "perplexity": statistics.geometric_mean(one.perplexity for one in own),
            "reference_perplexity": statistics.geometric_mean(one.reference_perplexity for one in own),
            "router_flips": statistics.fmean(flips) if flips else None,
            "window_kl": [one.kl for one in own],
        }
    return scores


def table(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> str:
    """Return the rows as a Markdown table, a line for each role and a column for each contender."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        line = lines.setdefault(row["role"], [row["role"], f"{row['weights'] / 1e6:.3g}"])
        kls = ", ".join(f"{row['texts'][text]['kl']:.5f}" for text in texts)
        share = "" if row["name"] == HQQ else f"; {row['share']:.2f}"
        line.append(f"{kls} ({row['bits']:.3f}{share})")
    what = f"KL of {', '.join(texts)} (bits; share of HQQ's KL closed)"
    return markdown_table(["role", "million weights", *(f"{name}: {what}" for name in names)], list(lines.values()))


def losses(rows: Sequence[Mapping[str, Any]]) -> list[Loss]:
    """Return the texts of each role on which ``fast`` or ``balanced`` is worse than a rival, the worst first."""
    by_name = {(row["role"], row["name"]): row for row in rows}
    pairs = [(row, (row["role"], rival)) for row in rows if row["name"] in OURS for rival in RIVALS]
    found = []
    for ours, rival in [(row, by_name[key]) for row, key in pairs if key in by_name]:
        for text in ours["texts"]:
            mine, theirs = ours["texts"][text], rival["texts"][text]
            if mine["kl"] > theirs["kl"]:
                kl, bits = (mine["kl"], theirs["kl"]), (ours["bits"], rival["bits"])
                error = _standard_error(mine["window_kl"], theirs["window_kl"])
                found.append(Loss(ours["role"], ours["name"], rival["name"], text, kl, bits, error))
    return sorted(found, key=lambda loss: loss.kl[1] / loss.kl[0])


def _standard_error(mine: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return that of the mean difference over windows."""
    if len(mine) < 2:
        return None
    return statistics.stdev(a - b for a, b in zip(mine, theirs, strict=True)) / len(mine) ** 0.5


def describe_losses(found: Sequence[Loss]) -> str:
    """Return the losses as two lists: to rivals of equal or fewer bits, and to those of more bits."""
    equal = [loss.line() for loss in found if loss.bits[1] <= loss.bits[0] + 1e-9]
    more = [loss.line() for loss in found if loss.bits[1] > loss.bits[0] + 1e-9]
    parts = []
    for title, lines in (("equal or fewer bits", equal), ("more bits", more)):
        parts.append("\n".join([f"Worse than a rival of {title}:", "", *(lines or ["- nowhere"])]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
