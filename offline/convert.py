"""Streamed conversion: a model folder in, a MiLo checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_milo import __version__
from vllm_milo.checkpoint import (
    PACKED,
    SCALE,
    U_SCALE,
    V_SCALE,
    ZERO,
    CompensatorFormat,
    MiLoFormat,
    RankTable,
    U,
    V,
    find_key,
)
from vllm_milo.kernels.packing import pack_codes
from vllm_milo.validation import validate_checkpoint

from .conversion import Conversion
from .errors import ConversionError
from .milo import Quantized, quantize_matrices
from .moments import PlainSquares
from .planning import Batch, excess_kurtosis, load_batches, plan_ranks, progress_bar
from .ranks import Matrix
from .reader import Layer, ModelReader
from .recipe import Recipe
from .writer import CheckpointWriter

__all__ = ["Conversion", "Summary", "convert", "excess_kurtosis", "rank_table"]

REPORT_NAME = "milo_report.json"
_FUSED_IN_VLLM = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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


class MatrixReport(NamedTuple):
    """What the report file says of one matrix: relative error, rank, rounds."""

    error: float
    rank: int
    rounds: int


def convert(source: Path, out: Path, conversion: Conversion, progress: bool = True) -> Summary:
    """Quantize the model folder ``source`` into the MiLo checkpoint ``out``.

    ``out`` appears whole or not at all.

    Raises:
        ConversionError, CheckpointError, ShardError: bad input, or the output cannot be written.
    """
    start = time.monotonic()
    reader = ModelReader(source)
    device = _device(conversion.device)
    ignore = (*reader.family.ignore, *conversion.ignore)
    _check_ignore(conversion.ignore, reader.matrices)
    plan = [_without_ignored(layer, ignore) for layer in reader.layers]
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
    ranks, warnings = plan_ranks(reader, plan, conversion, device, progress)
    fmt = MiLoFormat(
        base_format.group_size, base_format.compensator, rank_table(matrices, ranks), ignore, base_format.recipe
    )
    report: dict[str, MatrixReport] = {}
    with CheckpointWriter(out, conversion.overwrite, conversion.shard_bytes) as writer:
        for layer in progress_bar(plan, "quantize", progress):
            report |= _convert_layer(reader, layer, ranks, conversion, device, writer)
        config = reader.config | {"quantization_config": fmt.to_dict()}
        writer.seal(config, source, {REPORT_NAME: _report(report)})
        validate_checkpoint(writer.partial)
        writer.publish()
    errors = [entry.error for entry in report.values()]
    return Summary(
        out=out,
        seconds=time.monotonic() - start,
        matrices=len(matrices),
        bytes_written=writer.bytes_written,
        mean_error=sum(errors) / len(errors),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        warnings=warnings,
    )


def rank_table(matrices: Sequence[Matrix], ranks: Mapping[str, int]) -> RankTable:
    """Return the checkpoint's rank table: exact names, and one number where all experts agree."""
    modules = {m.name: ranks[m.name] for m in matrices if m.experts is None and ranks[m.name]}
    by_projection: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for matrix in matrices:
        if matrix.experts is not None and matrix.expert is not None:
            projection = matrix.name.rpartition(".")[2]
            by_projection[matrix.experts][projection][matrix.expert] = ranks[matrix.name]
    experts: dict[str, dict[str, int | list[int]]] = {}
    for name, projections in by_projection.items():
        table: dict[str, int | list[int]] = {}
        for projection, by_expert in projections.items():
            values = [by_expert[index] for index in sorted(by_expert)]
            table[projection] = values[0] if len(set(values)) == 1 else values
        if any(table.values()):
            experts[name] = table
    return RankTable(0, modules, experts)


def _convert_layer(
    reader: ModelReader,
    layer: Layer,
    ranks: Mapping[str, int],
    conversion: Conversion,
    device: torch.device,
    writer: CheckpointWriter,
) -> dict[str, MatrixReport]:
    report: dict[str, MatrixReport] = {}
    recipe = conversion.recipe
    for batch in load_batches(reader, layer, conversion.calibration, ranks, device, mixed=recipe.method == "milo"):
        theirs = [ranks[matrix.name] for matrix in batch.matrices]
        result = _quantize_named(batch, theirs, recipe, reader.dtype)
        for index, (matrix, rank) in enumerate(zip(batch.matrices, theirs, strict=True)):
            _write_matrix(writer, matrix.name, rank, result, index)
            report[matrix.name] = MatrixReport(float(result.errors[index]), rank, int(result.rounds[index]))
    for tensor in layer.others:
        writer.add(reader.family.checkpoint_name(tensor), reader.load_finite(tensor))
    return report


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


def _write_matrix(writer: CheckpointWriter, name: str, rank: int, result: Quantized, index: int) -> None:
    writer.add(f"{name}.{PACKED}", pack_codes(result.base.codes[index]))
    writer.add(f"{name}.{SCALE}", result.base.scale[index])
    writer.add(f"{name}.{ZERO}", result.base.zero[index])
    for factor, tensor, scale in ((result.u, U, U_SCALE), (result.v, V, V_SCALE)):
        if factor is not None:
            values = factor.values[index, :rank]
            writer.add(f"{name}.{tensor}", pack_codes(values) if values.dtype == torch.uint8 else values)
            if factor.scale is not None:
                writer.add(f"{name}.{scale}", factor.scale[index, :rank])


def _without_ignored(layer: Layer, ignore: Sequence[str]) -> Layer:
    """Move the matrices that are not to be quantized to the tensors that are copied."""
    kept = [source for source in layer.matrices if find_key(ignore, source.matrix.name) is None]
    dropped = [source for source in layer.matrices if find_key(ignore, source.matrix.name) is not None]
    for source in dropped:
        if source.matrix.experts is not None:
            raise ConversionError(
                f"--ignore matches {source.matrix.name}: routed experts of a layer cannot be left out one by one"
            )
    return Layer(layer.name, kept, layer.others + [source.tensor for source in dropped])


def _check_ignore(ignore: Sequence[str], matrices: Sequence[Matrix]) -> None:
    for key in ignore:
        if all(find_key([key], matrix.name) is None for matrix in matrices):
            raise ConversionError(f"--ignore {key!r} matches no layer; names look like {matrices[0].name!r}")
    names = {matrix.name for matrix in matrices if matrix.experts is None}
    for group in _FUSED_IN_VLLM:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if leaf == group[0]:
                parts = [part for part in (f"{parent}.{leaf}" for leaf in group) if part in names]
                ignored = [part for part in parts if find_key(ignore, part) is not None]
                if ignored and len(ignored) < len(parts):
                    kept = next(part for part in parts if part not in ignored)
                    raise ConversionError(
                        f"--ignore matches {ignored[0]} but not {kept}: vLLM fuses these layers, ignore both"
                    )


def _recipe_record(conversion: Conversion) -> dict[str, Any]:
    policies = ",".join(f"{policy.name}={policy.rank}" for policy in conversion.policies)
    record = {"tool": f"vllm-milo {__version__}", "ranks": policies, **asdict(conversion.recipe)}
    if conversion.budget_bits is not None:
        record["budget_bits"] = conversion.budget_bits
    return record | conversion.calibration.describe()


def _report(report: Mapping[str, MatrixReport]) -> dict[str, Any]:
    return {
        "relative_error": "|W - W'| / |W|, Frobenius, everything as stored",
        "matrices": {name: entry._asdict() for name, entry in report.items()},
    }


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConversionError(f"--device {name}: torch sees no CUDA device; use --device cpu")
    return device
