"""Streamed conversion: a model folder in, a MiLo checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from vllm_milo.shards import INDEX_NAME, read_json
from vllm_milo.validation import validate_checkpoint

from .along.layers import learn_along, tune_together
from .batches import gather_layers
from .bench import Bench
from .calibration import memory
from .checkpoint.card import write_card
from .checkpoint.claim import Claim
from .checkpoint.matrices import Result
from .checkpoint.report import REPORT_NAME, Report
from .checkpoint.writer import CheckpointWriter
from .conversion import Conversion, Summary
from .errors import ConversionError
from .fingerprint import BATCH_WEIGHTS, fingerprint, refuse_other_layers
from .nouns import Matrix, Recipe
from .planning.plan import Plan, make_plan
from .planning.shards import shard_uses
from .progress import doing, progress_bar
from .ranks.plan import Pass, plan_ranks
from .source.layers import Layer
from .source.reader import ModelReader
from .spread.devices import Devices
from .spread.load import load_batches
from .steps import BEGINNING, Layers, Others, Start, add_layers, finished_layers, keep_steps


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
        todo = (
            memory.advice(plan.reader, text.windows, conversion.device)
            if text
            else "use another --device, or less --device-memory"
        )
        described = ConversionError(f"{conversion.device}: out of memory; {todo}")
        for note in getattr(error, "__notes__", ()):
            described.add_note(note)
        raise described from error


def _convert(planned: Plan, progress: bool, claim: Claim) -> Summary:
    start = time.monotonic()
    out, conversion, device = planned.out, planned.conversion, planned.device
    elements = _batch_weights(planned, claim)
    decided_by = fingerprint(planned.reader, conversion, planned.format().recipe, elements)
    if claim.decided:
        refuse_other_layers(claim.partial, claim.decided, decided_by)
    ranks, warnings = planned.ranks, list(planned.warnings)
    if not planned.exact and claim.published is None:
        over = Pass(planned.reader, planned.layers, device, progress)
        ranks, remarks = plan_ranks(over, conversion.rank_choice, conversion.recipe)
        warnings += remarks
    report = Report()
    layers = sum(bool(layer.matrices) for layer in planned.layers)
    final = conversion.text is None or conversion.text.tune is None
    durable = (claim, decided_by, layers, final, planned.reader.shards.used)
    folder = planned.reader.folder
    output = CheckpointWriter(out, folder, conversion.overwrite, conversion.shard_bytes, *durable)
    with output as writer, Devices(planned.devices) as devices:
        for record in writer.journal.records:
            report.restore(record.said)
        bench = Bench(planned.reader, devices, elements, report, progress, planned.layout, writer.folder)
        if claim.published is None:
            _write(writer, planned, ranks, bench)
    assert claim.published is not None
    published = claim.published
    if published != writer.out:
        warnings = [*warnings, f"{out}: appeared during the conversion and was kept; the checkpoint is {published}"]
    warnings = [*warnings, *report.warnings]
    errors = [entry.error for entry in report.matrices.values()]
    return Summary(
        out=out if published == writer.out and out.exists() else published,  # none/../out is not there without none
        seconds=time.monotonic() - start,
        matrices=len(planned.matrices),
        bytes_written=read_json(published / INDEX_NAME)["metadata"]["total_size"],
        mean_error=sum(errors) / len(errors),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_device_bytes=max(devices.peak, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0),
        warnings=warnings,
        worst=report.worst(),
        spent=devices.seconds | output.seconds,
    )


def _batch_weights(planned: Plan, claim: Claim) -> int:
    """Return the most weights that the solver gets at once: those of the finished layers, if memory allows them."""
    before = claim.decided.get(BATCH_WEIGHTS)
    return min(planned.batch_weights, before) if isinstance(before, int) else planned.batch_weights


def _write(writer: CheckpointWriter, planned: Plan, ranks: Mapping[str, int], bench: Bench) -> None:
    """Quantize the layers that are not finished, and publish the checkpoint."""
    conversion, layers, report = planned.conversion, planned.layers, bench.report
    others = Others(bench.device, conversion.lm_head_bits)
    at = Start(writer.journal.layers, finished_layers(writer.journal, layers, bench.device))
    uses = shard_uses(bench.reader, layers, at.layers, conversion.text is not None)
    coming = bench.reader.shards.coming(uses, writer.journal.source)
    with coming, closing(quantize_steps(bench, layers, ranks, conversion, at)) as steps:
        keep_steps(writer, bench.reader, report, steps, others)
    if conversion.text is not None and conversion.text.tune is not None:
        held = list(finished_layers(writer.journal, layers, bench.device))
        add_layers(writer, bench.reader, tune_together(bench, held, conversion.recipe, conversion.text), others)
    got = {name: entry.rank for name, entry in report.matrices.items()}
    todo: dict[str, Callable[[], object]] = {
        "seal": partial(writer.seal, planned.config(planned.format(got)), {REPORT_NAME: report.to_dict()}),
        "check": partial(validate_checkpoint, writer.folder),
        "write the card": partial(write_card, writer.folder, bench.reader.folder, conversion.card),
        "publish": writer.publish,
    }
    for name in progress_bar(list(todo), "finish", bench.progress, unit="step"):
        doing(name)
        todo[name]()


def quantize_layers(bench: Bench, plan: Sequence[Layer], ranks: Mapping[str, int], conversion: Conversion) -> Layers:
    """Yield the layers of a model, quantized: each by itself, or along a calibration text.

    Args:
        bench: the model, the devices and the report.
        plan: the model's layers, with the matrices to quantize in each.
        ranks: of these matrices, by name; where ranks are measured, the bits of a layer's count.
        conversion: the recipe and the text, and whether ranks are measured; what is ignored is not decided here.

    Raises:
        ConversionError: a matrix cannot be quantized, or there is too little memory.
    """
    text = conversion.text
    with closing(quantize_steps(bench, plan, ranks, conversion)) as steps:
        layers = (one for step in steps for one in step)
        if text is None or text.tune is None:
            yield from layers
        else:
            held = [(layer, list(solved)) for layer, solved in layers]
            yield from tune_together(bench, held, conversion.recipe, text)


def quantize_steps(
    bench: Bench, plan: Sequence[Layer], ranks: Mapping[str, int], conversion: Conversion, start: Start = BEGINNING
) -> Generator[Layers, None, None]:
    """Yield the layers of a model, quantized, before they are trained together; see :func:`quantize_layers`.

    Each step must be used up before the next, and the whole be used up or closed.

    Args:
        bench, plan, ranks, conversion: as there.
        start: the first layers, which were quantized before.

    Raises:
        ConversionError: a matrix cannot be quantized, or there is too little memory.
    """
    if conversion.text is None:
        yield from _plain(bench, plan[start.layers :], ranks, conversion.recipe)
    else:
        yield from learn_along(bench, plan, ranks, conversion, conversion.text, start)


def _plain(
    bench: Bench, layers: Sequence[Layer], ranks: Mapping[str, int], recipe: Recipe
) -> Generator[Layers, None, None]:
    """Quantize layers each by itself; the next batch is read while one is solved, also across layers."""
    device, rule = bench.device, bench.rule(recipe)
    jobs = (
        job
        for together in gather_layers(layers, device, rule.elements)
        for job in load_batches(bench.reader, together, ranks, recipe, rule, device.type == "cuda")
    )
    shown = progress_bar(layers, "quantize", bench.progress, sizes=[layer.weights for layer in layers])
    with closing(bench.devices.solve(jobs, reading=True)) as done, bench.reader.shards.stopping():
        solved = bench.noted(done)
        for together in gather_layers(shown, device, rule.elements):
            yield _by_layer(together, islice(solved, sum(len(layer.matrices) for layer in together)))


def _by_layer(layers: Sequence[Layer], solved: Iterable[tuple[Matrix, Result]]) -> Layers:
    """Yield layers that were solved together with the matrices of each."""
    if len(layers) == 1:
        yield layers[0], solved
        return
    found = dict(solved)
    for layer in layers:
        yield layer, [(source.matrix, found.pop(source.matrix)) for source in layer.matrices]
