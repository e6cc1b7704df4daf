"""Streamed conversion: a model folder in, a MiLo checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_milo import __version__
from vllm_milo.checkpoint import CompensatorFormat, MiLoFormat
from vllm_milo.validation import validate_checkpoint

from .batches import Batch, batches, load_batches
from .calibration.moment_source import PlainSquares
from .calibration.sequential import SequentialPass, Visit
from .checkpoint.matrices import add_matrix, rank_table
from .checkpoint.output import refuse_unsafe_output
from .checkpoint.report import REPORT_NAME, MatrixReport, report_file
from .checkpoint.writer import CheckpointWriter
from .conversion import Conversion
from .errors import ConversionError
from .learn.layer import learn_layer
from .nouns import Matrix, Recipe
from .progress import progress_bar
from .ranks.plan import Pass, RankChoice, plan_ranks
from .solve.methods import Quantized, Solved, quantize_matrices
from .source.ignore import check_ignore, without_ignored
from .source.layers import Layer, layer_index
from .source.reader import ModelReader
from .source.streamed_model import StreamedModel, reader_tensors


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


def convert(source: Path, out: Path, conversion: Conversion, progress: bool = True) -> Summary:
    """Quantize the model folder ``source`` into the MiLo checkpoint ``out``.

    ``out`` appears whole or not at all.

    Raises:
        ConversionError, CheckpointError, ShardError: bad input, or the output cannot be written.
    """
    start = time.monotonic()
    refuse_unsafe_output(out, source, conversion.overwrite)
    reader = ModelReader(source)
    device = _device(conversion.device)
    ignore = (*reader.family.ignore, *conversion.ignore)
    check_ignore(conversion.ignore, reader.matrices)
    plan = [without_ignored(layer, ignore) for layer in reader.layers]
    matrices = [source_.matrix for layer in plan for source_ in layer.matrices]
    if not matrices:
        raise ConversionError("--ignore leaves no matrix to quantize")
    base_format = MiLoFormat(
        group_size=conversion.recipe.group_size,
        compensator=CompensatorFormat(conversion.recipe.factor_bits),
        ignore=ignore,
        recipe=_recipe_record(conversion),
    )
    for matrix in matrices:
        base_format.check_matrix(matrix.name, matrix.n, matrix.k)
    if not isinstance(conversion.calibration, PlainSquares) and conversion.recipe.method != "milo":
        raise ConversionError(f"--method {conversion.recipe.method} cannot use a calibration; use --method milo")
    choice = RankChoice(conversion.policies, conversion.budget_bits, conversion.expert_counts)
    model = Pass(reader, plan, device, progress)
    ranks, warnings = plan_ranks(model, choice, conversion.recipe, conversion.calibration)
    fmt = MiLoFormat(
        base_format.group_size, base_format.compensator, rank_table(matrices, ranks), ignore, base_format.recipe
    )
    report: dict[str, MatrixReport] = {}
    stream = None
    if conversion.windows is not None:
        dtype = reader.dtype if device.type == "cuda" else torch.float32
        streamed = StreamedModel(
            source, reader.family, reader_tensors(reader.load_finite, reader.tensors), device, dtype
        )
        stream = SequentialPass(streamed, reader.family, conversion.windows)
    with CheckpointWriter(out, source, conversion.overwrite, conversion.shard_bytes) as writer:
        for layer in progress_bar(plan, "quantize", progress):
            report |= _convert_layer(reader, layer, ranks, conversion, device, writer, stream)
        config = reader.config | {"quantization_config": fmt.to_dict()}
        writer.seal(config, {REPORT_NAME: report_file(report)})
        validate_checkpoint(writer.partial)
        published = writer.publish()
    if published != writer.out:
        warnings = [*warnings, f"{out}: appeared during the conversion and was kept; the checkpoint is {published}"]
    errors = [entry.error for entry in report.values()]
    return Summary(
        out=published if published != writer.out else out,
        seconds=time.monotonic() - start,
        matrices=len(matrices),
        bytes_written=writer.bytes_written,
        mean_error=sum(errors) / len(errors),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        warnings=warnings,
    )


def _convert_layer(
    reader: ModelReader,
    layer: Layer,
    ranks: Mapping[str, int],
    conversion: Conversion,
    device: torch.device,
    writer: CheckpointWriter,
    stream: SequentialPass | None,
) -> dict[str, MatrixReport]:
    """Quantize a layer and write it; with a calibration stream, learn it in between and lead the stream on."""
    report: dict[str, MatrixReport] = {}
    index = layer_index(layer.name)
    if stream is None or index is None:
        loaded = load_batches(reader, layer, conversion.calibration, ranks, device, conversion.recipe.method == "milo")
        found = _solve(loaded, ranks, conversion.recipe, reader.dtype, report)
        for matrix, one in found:
            add_matrix(writer, matrix.name, one)
    else:
        visit = stream.visit(index)
        loaded = batches(visit.loaded([source.matrix for source in layer.matrices]), visit.moments, ranks)
        solved = dict(_solve(loaded, ranks, conversion.recipe, reader.dtype, report))
        solved = learn_visit(stream, visit, solved, conversion)
        for matrix, one in solved.items():
            add_matrix(writer, matrix.name, one)
        visit.leave({matrix: one.dequantize() for matrix, one in solved.items()})
    for tensor in layer.others:
        writer.add(reader.family.checkpoint_name(tensor), reader.load_finite(tensor))
    return report


def learn_visit(
    stream: SequentialPass, visit: Visit, solved: dict[Matrix, Solved], conversion: Conversion
) -> dict[Matrix, Solved]:
    options = conversion.learn
    if not solved or options.steps == 0:
        return solved
    learned, report = learn_layer(
        stream.model,
        visit.index,
        visit.module,
        solved,
        stream.quantized,
        stream.original,
        visit.target,
        visit.moments.tokens,
        conversion.recipe.factor_bits,
        options,
    )
    if os.environ.get("MILO_SAY"):
        print(
            f"layer {visit.index}: {report.before:.5f} -> {report.after:.5f} untrained {len(report.untrained)}",
            flush=True,
        )
    return learned


def _solve(
    layer: Iterable[Batch],
    ranks: Mapping[str, int],
    recipe: Recipe,
    dtype: torch.dtype,
    report: dict[str, MatrixReport],
) -> Iterator[tuple[Matrix, Solved]]:
    """Yield the solved matrices of a layer, and put what there is to say of each into ``report``."""
    for batch in layer:
        theirs = [ranks[matrix.name] for matrix in batch.matrices]
        result = _quantize_named(batch, theirs, recipe, dtype)
        for place, (matrix, rank) in enumerate(zip(batch.matrices, theirs, strict=True)):
            report[matrix.name] = MatrixReport(float(result.errors[place]), rank, int(result.rounds[place]))
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


def _recipe_record(conversion: Conversion) -> dict[str, Any]:
    policies = ",".join(f"{policy.name}={policy.rank}" for policy in conversion.policies)
    record = {"tool": f"vllm-milo {__version__}", "ranks": policies, **asdict(conversion.recipe)}
    if conversion.budget_bits is not None:
        record["budget_bits"] = conversion.budget_bits
    return record | conversion.calibration.describe()


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConversionError(f"--device {name}: torch sees no CUDA device; use --device cpu")
    return device
