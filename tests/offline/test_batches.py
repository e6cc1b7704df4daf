"""Layers that are solved together, so that a GPU has enough to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from vllm_milo.offline import convert as converter
from vllm_milo.offline.batches import gather_layers
from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.layers import Layer
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.validation import validate_checkpoint


@pytest.mark.parametrize(("room", "expected"), [(0.5, [1] * 5), (1, [1, 1, 1, 2]), (2, [2, 3]), (100, [5])])
def test_a_gpu_gets_as_many_layers_as_fill_it(bundled_model: Path, room: float, expected: list[int]):
    layers = ModelReader(bundled_model).layers  # four of a size, and one without matrices
    weights = max(sum(s.matrix.n * s.matrix.k for s in layer.matrices) for layer in layers)
    elements = int(room * weights)
    together = list(gather_layers(layers, torch.device("cuda"), elements))
    assert [layer for part in together for layer in part] == layers
    assert sorted(map(len, together)) == sorted(expected)
    for part in together:
        found = sum(s.matrix.n * s.matrix.k for layer in part for s in layer.matrices)
        assert len(part) == 1 or found <= room * weights
    assert [len(part) for part in gather_layers(layers, torch.device("cpu"), elements)] == [1] * len(layers)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return dict(DequantizedTensors(folder, validate_checkpoint(folder), torch.float32).load())


def test_layers_solved_together_are_what_they_are_alone(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def all_of_them(layers: Iterable[Layer], *_: object) -> list[list[Layer]]:
        return [list(layers)]

    conversion = Conversion(Recipe("milo", 64, max_rounds=2, base="hqq"), parse_policies("dense=16,sparse=8"))
    alone = written(convert(small_model, tmp_path / "alone", conversion, progress=False).out)
    monkeypatch.setattr(converter, "gather_layers", all_of_them)
    together = written(convert(small_model, tmp_path / "together", conversion, progress=False).out)
    assert list(alone) == list(together)  # in the order of the layers
    for name, weights in alone.items():
        error = (together[name].float() - weights.float()).norm() / weights.float().norm().clamp(min=1e-30)
        assert error < 0.02, name
