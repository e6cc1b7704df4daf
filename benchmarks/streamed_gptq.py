"""GPTQ of a model that need not fit in memory as a whole: a layer at a time, into a folder of dequantized weights.

As GPTQ is usually run: layers see what the quantized layers before them put out, and within a layer each stage what the
quantized stages before it put out. It gets the calibration text that `milo quantize` takes, and as much of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.accuracy.gptq import Gptq, gptq
from vllm_milo.names import EXPERT_PROJECTIONS, QKV_PARTS, leaf_of
from vllm_milo.offline.calibration.choose import PACKAGED, TextOptions, calibration_windows
from vllm_milo.offline.calibration.input_moments import InputMoments
from vllm_milo.offline.checkpoint.writer import CheckpointWriter
from vllm_milo.offline.effort import default_windows
from vllm_milo.offline.nouns import LoadedMatrix, Matrix
from vllm_milo.offline.source.layers import Layer, layer_index
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, reader_tensors

BATCH = 32
"""Windows that go through a layer at once."""


def write_gptq(source: Path, out: Path, options: Gptq, device: torch.device) -> None:
    """Write a model folder with GPTQ's values of all matrices, in the source's dtype.

    Args:
        source: the model.
        out: the folder, which appears whole or not at all.
        options: how to quantize.
        device: where layers run and are quantized.

    Raises:
        ConversionError, ShardError: the source is no model or a broken one, or ``out`` cannot be written.
    """
    reader = ModelReader(source)
    dtype = reader.dtype if device.type == "cuda" else torch.float32
    model = StreamedModel(source, reader.family, reader_tensors(reader.load, reader.tensors), device, dtype)
    windows = calibration_windows(reader, PACKAGED, TextOptions(default_windows(reader, str(device))))
    with CheckpointWriter(out, source) as writer:
        for layer, found in gptq_layers(model, reader, windows, options):
            for matrix, values in found.items():
                writer.add(f"{matrix.name}.weight", values.to(reader.dtype))
            for tensor in layer.others:
                writer.add(reader.family.checkpoint_name(tensor), reader.load_finite(tensor))
        writer.seal(reader.config, {})
        writer.publish()


@torch.no_grad()
def gptq_layers(
    model: StreamedModel, reader: ModelReader, windows: torch.Tensor, options: Gptq
) -> Iterator[tuple[Layer, Mapping[Matrix, torch.Tensor]]]:
    """Yield the layers with GPTQ's values of their matrices, float32 [N, K] each."""
    states = model.begin(windows)
    for layer in reader.layers:
        index = layer_index(layer.name)
        if index is None:
            yield layer, {}
            continue
        module = model.layer(index)
        found: dict[Matrix, torch.Tensor] = {}
        held = {name: module.get_parameter(own).data for name, own in model.parameters(index, module).items()}
        for stage in stages([source.matrix for source in layer.matrices]):
            moments = InputMoments(module, f"{layer.name}.", reader.family)
            model.advance(index, module, states, BATCH)
            moments.close()
            places = {matrix: model.place(f"{matrix.name}.weight", held)[1] for matrix in stage}
            for matrix, values in quantize_stage(places.items(), moments, options).items():
                places[matrix].copy_(values)
                found[matrix] = values
        states = model.advance(index, module, states, BATCH)
        model.drop(module)
        yield layer, found


def stages(matrices: Iterable[Matrix]) -> list[list[Matrix]]:
    """Return the matrices of a layer in the order in which a token passes them: q, k, v; o; gate and up; down."""
    found: dict[int, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        leaf = leaf_of(matrix.name)
        role = EXPERT_PROJECTIONS.get(leaf)
        stage = (3 if role == "down" else 2) if role else (0 if leaf in QKV_PARTS else 1)
        found[stage].append(matrix)
    return [found[stage] for stage in sorted(found)]


def quantize_stage(
    loaded: Iterable[LoadedMatrix], moments: InputMoments, options: Gptq
) -> Mapping[Matrix, torch.Tensor]:
    """Return GPTQ's values of some matrices, float32 [N, K] each; those of one shape are rounded together."""
    groups: dict[tuple[int, int, str], list[LoadedMatrix]] = defaultdict(list)
    for matrix, values in loaded:
        groups[matrix.n, matrix.k, moments.group(matrix)].append((matrix, values))
    result: dict[Matrix, torch.Tensor] = {}
    for group in groups.values():
        matrices = [matrix for matrix, _ in group]
        weights = torch.stack([values.float() for _, values in group])
        found = moments.of(matrices, weights.device).inputs
        assert found is not None
        found = torch.diag_embed(found) if found.dim() == 2 else found  # of sides too long for a full moment
        result |= zip(matrices, gptq(weights, found.expand(len(group), -1, -1), options), strict=True)
    return result
