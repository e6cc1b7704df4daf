"""The steps of a conversion: layers that are solved together, on their way to the disk and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from vllm_milo.head.layout import PLAIN_BITS

from .checkpoint.head import head_on_host
from .checkpoint.matrices import Result, read_matrix, tensors_on_host
from .checkpoint.report import Report
from .checkpoint.writer import CheckpointWriter
from .durable.journal import Journal
from .nouns import Matrix
from .source.layers import Layer
from .source.reader import ModelReader

Layers = Iterator[tuple[Layer, Iterable[tuple[Matrix, Result]]]]
"""Layers with their quantized matrices."""


class Start(NamedTuple):
    """Where a conversion goes on: how many layers are finished, and these with their matrices, read as they are used.

    The number is one after a step; see :func:`keep_steps`.
    """

    layers: int
    finished: Layers


class Others(NamedTuple):
    """What becomes of tensors that are in no quantized matrix.

    They are copied; what has fewer than 16 bits a weight in the source becomes values on ``device``. The output head
    becomes integers of ``head_bits`` bits.
    """

    device: torch.device
    head_bits: int = PLAIN_BITS

    def of(self, reader: ModelReader, layer: Layer) -> dict[str, torch.Tensor]:
        """Return those of a layer, on the CPU, by their names in checkpoints.

        Raises:
            ConversionError: one holds NaN or Inf, or fp16 cannot hold the head's scales.
        """
        found: dict[str, torch.Tensor] = {}
        for tensor in layer.others:
            name, values = reader.family.checkpoint_name(tensor), reader.load_finite(tensor, self.device)
            if self.head_bits != PLAIN_BITS and name == f"{reader.family.head}.weight":
                found |= head_on_host(reader.family.head, values, self.head_bits, self.device)
            else:
                found[name] = values.cpu()
        if reader.shards.streamed:  # a tensor that lies in a file would keep its room on the disk until it is written
            return {name: tensor.clone() for name, tensor in found.items()}
        return found


BEGINNING = Start(0, iter(()))


def keep_steps(
    writer: CheckpointWriter, reader: ModelReader, report: Report, steps: Iterable[Layers], others: Others
) -> None:
    """Put the layers of each step, which were solved together, on the disk with the part of the report that is theirs.

    A step is written while the next one is computed (:meth:`.CheckpointWriter.keep`); all are on the disk at the end.

    Raises:
        ConversionError: a layer cannot be quantized, or the disk is full.
    """
    mark = report.mark()
    for step in steps:
        names: list[str] = []
        tensors: dict[str, torch.Tensor] = {}
        ranks: dict[str, int] = {}
        for layer, solved in step:
            names.append(layer.name)
            tensors |= tensors_on_host(_noting_ranks(solved, ranks))
            tensors |= others.of(reader, layer)
        writer.keep(names, tensors, ranks, report.since(mark))
        if reader.shards.streamed:
            writer.wait()  # its shards go before more come
        mark = report.mark()
    writer.wait()


def _noting_ranks(solved: Iterable[tuple[Matrix, Result]], ranks: dict[str, int]) -> Iterator[tuple[Matrix, Result]]:
    for matrix, one in solved:
        ranks[matrix.name] = one.rank
        yield matrix, one


def finished_layers(journal: Journal, plan: Sequence[Layer], device: torch.device) -> Layers:
    """Yield the layers of the model as they are on the disk, with their matrices on ``device`` in the order there.

    Raises:
        ConversionError: a file is damaged.
    """
    by_name = {layer.name: layer for layer in plan}
    for record in journal.records:
        tensors = journal.tensors(record) if record.ranks else {}
        for name in record.layers:
            matrices = {source.matrix.name: source.matrix for source in by_name[name].matrices}
            order = [matrices[matrix] for matrix in record.ranks if matrix in matrices]
            yield by_name[name], [(matrix, read_matrix(matrix.name, tensors, device)) for matrix in order]


def add_layers(writer: CheckpointWriter, reader: ModelReader, layers: Layers, others: Others) -> None:
    """Write layers to the checkpoint that the steps before it had changed, so that none of them is kept by itself.

    Raises:
        ConversionError: the disk is full.
    """
    for layer, solved in layers:
        for name, tensor in tensors_on_host(solved).items():
            writer.add(name, tensor)
        for name, tensor in others.of(reader, layer).items():
            writer.add(name, tensor)
