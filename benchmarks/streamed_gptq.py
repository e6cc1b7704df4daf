"""GPTQ of a model that need not fit in memory as a whole: a layer at a time, into a folder of dequantized weights.

Layers see what the quantized layers before them put out, by the converter's own pass over its own calibration text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.accuracy.gptq import Gptq, gptq
from vllm_milo.offline.calibration.choose import PACKAGED, TextOptions, calibration_windows
from vllm_milo.offline.calibration.input_moments import InputMoments
from vllm_milo.offline.calibration.sequential import SequentialPass
from vllm_milo.offline.checkpoint.writer import CheckpointWriter
from vllm_milo.offline.nouns import LoadedMatrix, Matrix
from vllm_milo.offline.source.layers import layer_index
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, reader_tensors

GPU_WINDOWS = 256
"""Windows of the packaged text that calibrate on a GPU: those that ``milo quantize`` takes."""
CPU_WINDOWS = 32
"""Windows that calibrate on a CPU."""


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
    on_gpu = device.type == "cuda"
    windows = calibration_windows(source, PACKAGED, TextOptions(GPU_WINDOWS if on_gpu else CPU_WINDOWS))
    dtype = reader.dtype if on_gpu else torch.float32
    model = StreamedModel(source, reader.family, reader_tensors(reader.load, reader.tensors), device, dtype)
    stream = SequentialPass(model, reader.family, windows)
    with CheckpointWriter(out, source) as writer:
        for layer in reader.layers:
            index = layer_index(layer.name)
            if index is not None:
                visit = stream.visit(index)
                found = quantize_layer(visit.loaded([of.matrix for of in layer.matrices]), visit.moments, options)
                visit.leave(found)
                for matrix, values in found.items():
                    writer.add(f"{matrix.name}.weight", values.to(reader.dtype))
            for tensor in layer.others:
                writer.add(reader.family.checkpoint_name(tensor), reader.load_finite(tensor))
        writer.seal(reader.config, {})
        writer.publish()


def quantize_layer(
    loaded: Iterable[LoadedMatrix], moments: InputMoments, options: Gptq
) -> Mapping[Matrix, torch.Tensor]:
    """Return GPTQ's values of a layer's matrices, float32 [N, K] each; those of one shape are rounded together."""
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
