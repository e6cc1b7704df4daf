"""Streamed conversion: a model folder in, a MiLo checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_milo.shards import INDEX_NAME, read_json
from vllm_milo.validation import validate_checkpoint

from .batches import Batch, batches, gather_layers, load_batches
from .calibration import memory
from .calibration.layer_moments import NoMoments
from .calibration.sequential import SequentialPass
from .calibration.weights import refuse_broken_weights
from .checkpoint.card import write_card
from .checkpoint.claim import Claim
from .checkpoint.report import REPORT_NAME, MatrixReport, Report
from .checkpoint.writer import CheckpointWriter
from .conversion import Conversion, Text
from .errors import ConversionError
from .fingerprint import fingerprint, refuse_other_layers
from .learn.end_to_end import tune
from .learn.layer import learn_layer
from .need import NeedMeter
from .nouns import Matrix, Recipe
from .planning.plan import Plan, make_plan
from .progress import doing, progress_bar
from .ranks.budget import stored_bits
from .ranks.plan import Pass, RankChoice, plan_ranks
from .solve.methods import Quantized, Solved, quantize_matrices
from .source.layers import Layer, layer_index
from .source.reader import ModelReader
from .source.streamed_model import StreamedModel, place_tensor, reader_tensors, use_grouped_experts
from .source.whole_model import load_source_model
from .steps import BEGINNING, Layers, Start, add_layers, finished_layers, keep_steps

FULL_MOMENTS_BELOW = 100
"""Steps of learning below which the solver gets full second moments of the inputs. Above, it makes no difference where
learning begins: on a real model of 0.5 B parameters, KL 0.078 from diagonals and 0.080 from full moments (200 steps,
2026-11-27), and diagonals need no factorizations."""


class Summary(NamedTuple):
    """What a conversion did."""

    out: Path
    seconds: float
    matrices: int
    bytes_written: int
    mean_error: float
    peak_host_bytes: int
    peak_device_bytes: int
    warnings: list[str]
    worst: Mapping[str, MatrixReport]


def convert(source: Path, out: Path, conversion: Conversion, progress: bool = True) -> Summary:
    """Quantize the model folder ``source`` into the MiLo checkpoint ``out``.

    ``out`` is claimed first (:class:`.checkpoint.claim.Claim`), then all that the headers of the source tell is checked
    (:func:`.planning.plan.make_plan`).

    Raises:
        ConversionError, CheckpointError, ShardError: bad input, too little memory, or the output cannot be written.
    """
    with Claim(out, source, conversion.overwrite, conversion.resume) as claim:
        summary = carry_out(make_plan(ModelReader(source), out, conversion, claim), progress, claim)
        return summary._replace(warnings=[*claim.notes, *summary.warnings])


def carry_out(plan: Plan, progress: bool = True, claim: Claim | None = None) -> Summary:
    """Do what was planned.

    The output appears whole or not at all. Layers that are finished survive whatever ends the process, and a conversion
    with ``resume`` goes on with them; an error or interrupt that leaves some behind says so in its notes.

    Args:
        plan: what is done, and where.
        progress: show progress bars.
        claim: of the output, entered; without one, the conversion makes its own.

    Raises:
        ConversionError, CheckpointError, ShardError: weights that cannot be quantized, too little memory, or the
            output cannot be written.
    """
    device, conversion = plan.device, plan.conversion
    if claim is None:
        with Claim(plan.out, plan.reader.folder, conversion.overwrite, conversion.resume) as own:
            summary = carry_out(plan, progress, own)
            return summary._replace(warnings=[*own.notes, *summary.warnings])
    on_device = (
        torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    )  # for Triton's launches
    try:
        with on_device:
            return _convert(plan, progress, claim)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        text = conversion.text
        todo = memory.advice(plan.reader, text.windows, conversion.device) if text else "use another --device"
        described = ConversionError(f"{conversion.device}: out of memory; {todo}")
        for note in getattr(error, "__notes__", ()):
            described.add_note(note)
        raise described from error


def _convert(planned: Plan, progress: bool, claim: Claim) -> Summary:
    start = time.monotonic()
    out, conversion, device = planned.out, planned.conversion, planned.device
    decided_by = fingerprint(planned.reader, conversion, planned.format().recipe)
    if claim.resume and claim.journal.quantized:
        refuse_other_layers(claim.partial, claim.journal.fingerprint or {}, decided_by)
    ranks, warnings = planned.ranks, list(planned.warnings)
    if not planned.exact and claim.published is None:
        choice = RankChoice(conversion.policies, conversion.budget_bits, conversion.expert_counts)
        over = Pass(planned.reader, planned.layers, device, progress)
        ranks, remarks = plan_ranks(over, choice, conversion.recipe)
        warnings += remarks
    report = Report()
    layers = sum(bool(layer.matrices) for layer in planned.layers)
    final = conversion.text is None or conversion.text.tune is None
    durable = (claim, decided_by, layers, final)
    folder = planned.reader.folder
    with CheckpointWriter(out, folder, conversion.overwrite, conversion.shard_bytes, *durable) as writer:
        for record in writer.journal.records:
            report.restore(record.said)
        if claim.published is None:
            _write(writer, planned, ranks, report, progress)
    assert claim.published is not None
    published = claim.published
    if published != writer.out:
        warnings = [*warnings, f"{out}: appeared during the conversion and was kept; the checkpoint is {published}"]
    warnings = [*warnings, *report.warnings]
    errors = [entry.error for entry in report.matrices.values()]
    return Summary(
        out=published if published != writer.out else out,
        seconds=time.monotonic() - start,
        matrices=len(planned.matrices),
        bytes_written=read_json(published / INDEX_NAME)["metadata"]["total_size"],
        mean_error=sum(errors) / len(errors),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        warnings=warnings,
        worst=report.worst(),
    )


def _write(writer: CheckpointWriter, planned: Plan, ranks: Mapping[str, int], report: Report, progress: bool) -> None:
    """Quantize the layers that are not finished, and publish the checkpoint."""
    reader, conversion, device, layers = planned.reader, planned.conversion, planned.device, planned.layers
    at = Start(writer.journal.layers, finished_layers(writer.journal, layers, device))
    steps = quantize_steps(reader, layers, ranks, conversion, device, report, progress, at)
    keep_steps(writer, reader, report, steps)
    if conversion.text is not None and conversion.text.tune is not None:
        held = list(finished_layers(writer.journal, layers, device))
        tuned = _tuned(reader, held, conversion.recipe, conversion.text, device, report, progress)
        add_layers(writer, reader, tuned)
    got = {name: entry.rank for name, entry in report.matrices.items()}
    todo: dict[str, Callable[[], object]] = {
        "seal": partial(writer.seal, planned.config(planned.format(got)), {REPORT_NAME: report.to_dict()}),
        "check": partial(validate_checkpoint, writer.folder),
        "write the card": partial(write_card, writer.folder, reader.folder, conversion.card),
        "publish": writer.publish,
    }
    for name in progress_bar(list(todo), "finish", progress, unit="step"):
        doing(name)
        todo[name]()


def quantize_layers(
    reader: ModelReader,
    plan: Sequence[Layer],
    ranks: Mapping[str, int],
    conversion: Conversion,
    device: torch.device,
    report: Report,
    progress: bool,
) -> Layers:
    """Yield the layers of a model, quantized: each by itself, or along a calibration text.

    Args:
        reader: the model.
        plan: its layers, with the matrices to quantize in each.
        ranks: of these matrices, by name; where ranks are measured, the bits of a layer's count.
        conversion: the recipe and the text, and whether ranks are measured; what is ignored is not decided here.
        device: where the arithmetic runs.
        report: takes what there is to say of each matrix, with the rank that it got.
        progress: show a progress bar.

    Raises:
        ConversionError: a matrix cannot be quantized, or there is too little memory.
    """
    text = conversion.text
    steps = quantize_steps(reader, plan, ranks, conversion, device, report, progress)
    layers = (one for step in steps for one in step)
    if text is None or text.tune is None:
        yield from layers
    else:
        held = [(layer, list(solved)) for layer, solved in layers]
        yield from _tuned(reader, held, conversion.recipe, text, device, report, progress)


def quantize_steps(
    reader: ModelReader,
    plan: Sequence[Layer],
    ranks: Mapping[str, int],
    conversion: Conversion,
    device: torch.device,
    report: Report,
    progress: bool,
    start: Start = BEGINNING,
) -> Iterator[Layers]:
    """Yield the layers of a model, quantized, before they are trained together; see :func:`quantize_layers`.

    Each step must be used up before the next.

    Args:
        reader, plan, ranks, conversion, device, report, progress: as there.
        start: the first layers, which were quantized before.

    Raises:
        ConversionError: a matrix cannot be quantized, or there is too little memory.
    """
    recipe, text = conversion.recipe, conversion.text
    if text is not None:
        meter = None
        if conversion.measures_ranks and conversion.budget_bits is not None:
            matrices = [source.matrix for layer in plan for source in layer.matrices]
            spare = conversion.budget_bits - stored_bits(matrices, ranks, recipe)
            meter = NeedMeter(recipe, reader.dtype, text.learn.batch, max(0.0, spare))
        yield from _learned(reader, plan, ranks, meter, recipe, text, device, report, progress, start)
        return
    left = plan[start.layers :]
    for layers in gather_layers(
        progress_bar(left, "quantize", progress, sizes=[layer.weights for layer in left]), device
    ):
        loaded = load_batches(reader, layers, NoMoments(), ranks, device, recipe.method == "milo")
        solved = _solve(loaded, ranks, recipe, reader.dtype, report)
        yield _by_layer(layers, solved)


def _by_layer(layers: Sequence[Layer], solved: Iterable[tuple[Matrix, Solved]]) -> Layers:
    """Yield layers that were solved together with the matrices of each."""
    if len(layers) == 1:
        yield layers[0], solved
        return
    found = dict(solved)
    for layer in layers:
        yield layer, [(source.matrix, found.pop(source.matrix)) for source in layer.matrices]


def _learned(
    reader: ModelReader,
    plan: Sequence[Layer],
    ranks: Mapping[str, int],
    meter: NeedMeter | None,
    recipe: Recipe,
    text: Text,
    device: torch.device,
    report: Report,
    progress: bool,
    start: Start,
) -> Iterator[Layers]:
    """Quantize layer after layer on what the quantized layers before it put out, and learn the codes of each."""
    left = plan[start.layers :]
    if all(layer_index(layer.name) is None for layer in left):
        yield from (iter([(layer, ())]) for layer in left)  # no hidden states are needed any more
        return
    memory.refuse_what_does_not_fit(reader, text.windows, str(device))
    dtype = reader.dtype if device.type == "cuda" else torch.float32
    tensors = reader_tensors(reader.load, reader.tensors)
    model = StreamedModel(reader.folder, reader.family, tensors, device, dtype)
    full = text.learn.steps < FULL_MOMENTS_BELOW
    stream = SequentialPass(model, reader.family, text.windows, text.learn.batch, full)
    if start.layers:
        _replay(stream, plan[: start.layers], start.finished, progress)
    else:
        refuse_broken_weights(reader, progress)
    for layer in progress_bar(left, "quantize", progress, sizes=[layer.weights for layer in left]):
        index = layer_index(layer.name)
        if index is None:
            yield iter([(layer, ())])
            continue
        doing("run the original")
        visit = stream.visit(index)
        matrices = [source.matrix for source in layer.matrices]
        own = {matrix.name: ranks[matrix.name] for matrix in matrices}
        if meter is not None:
            doing("measure needs")
            own, needs = meter.share(stream, visit, matrices, own)
            report.note_needs(layer.name, needs)
        loaded = batches(visit.loaded(matrices), visit.moments, own)
        solved = dict(_solve(loaded, own, recipe, reader.dtype, report))
        report.note_tokens(solved, visit.moments.tokens)
        if solved and text.learn.steps:
            states = (stream.quantized, visit.target)
            tokens = visit.moments.tokens
            solved, said = learn_layer(
                model, index, visit.module, solved, *states, tokens, recipe.factor_bits, text.learn
            )
            report.layers[layer.name] = said._asdict()
        doing("run quantized")
        visit.leave({matrix: one.dequantize() for matrix, one in solved.items()})
        yield iter([(layer, solved.items())])


def _replay(stream: SequentialPass, plan: Sequence[Layer], finished: Layers, progress: bool) -> None:
    """Let both streams go through layers that were quantized before; their weights were looked at then."""
    sizes = [layer.weights for layer in plan]
    for layer, (_, solved) in zip(progress_bar(plan, "replay", progress, sizes=sizes), finished, strict=True):
        index = layer_index(layer.name)
        if index is not None:
            stream.replay(index, {matrix: one.dequantize() for matrix, one in solved})


def _tuned(
    reader: ModelReader,
    layers: Sequence[tuple[Layer, Iterable[tuple[Matrix, Solved]]]],
    recipe: Recipe,
    text: Text,
    device: torch.device,
    report: Report,
    progress: bool,
) -> Layers:
    """Train all layers together on the original's predictions."""
    assert text.tune is not None
    model, original = (load_source_model(reader.folder, reader.dtype, str(device)).requires_grad_(False) for _ in "ab")
    for one in (model, original):
        use_grouped_experts(one)
    place = partial(place_tensor, reader.family)
    solved = {matrix: one for _, held in layers for matrix, one in held}
    what = (model, original, place, reader.family, solved, text.windows)
    trained, said = tune(*what, recipe.factor_bits, text.tune, progress)
    report.tuning = {"first_kl": said.first, "last_kl": said.last}
    for layer, held in layers:
        yield layer, [(matrix, trained[matrix]) for matrix, _ in held]


def _solve(
    layer: Iterable[Batch], ranks: Mapping[str, int], recipe: Recipe, dtype: torch.dtype, report: Report
) -> Iterator[tuple[Matrix, Solved]]:
    """Yield the solved matrices of a layer, and put what there is to say of each into the report."""
    for batch in layer:
        doing("solve", batch.matrices[0].name)
        theirs = [ranks[matrix.name] for matrix in batch.matrices]
        result = _quantize_named(batch, theirs, recipe, dtype)
        report.note_sizes(batch.matrices, batch.weights, result.base.scale)
        for place, (matrix, rank) in enumerate(zip(batch.matrices, theirs, strict=True)):
            entry = MatrixReport(float(result.errors[place]), rank, int(result.rounds[place]))
            report.matrices[matrix.name] = entry
            yield matrix, result.one(place, rank)


def _quantize_named(batch: Batch, ranks: Sequence[int], recipe: Recipe, dtype: torch.dtype) -> Quantized:
    """Quantize a batch; on failure find the matrix that fails and name it."""
    rank = ranks[0] if len(set(ranks)) == 1 else ranks
    try:
        return quantize_matrices(batch.weights, rank, recipe, dtype, batch.moments)
    except ConversionError as error:
        for index, matrix in enumerate(batch.matrices):
            one = slice(index, index + 1)
            try:
                quantize_matrices(batch.weights[one], ranks[index], recipe, dtype, batch.moments.select(one))
            except ConversionError as single_error:
                raise type(error)(f"{matrix.name}: {single_error}") from error
        raise
