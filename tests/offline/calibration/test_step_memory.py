"""The predicted memory of a training step against the tensors that live during one, counted on the CPU."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_milo.offline.calibration import memory
from vllm_milo.offline.calibration.sequential import SequentialPass
from vllm_milo.offline.calibration.step_memory import logit_bytes, passing_bytes, saved_bytes, shape_of
from vllm_milo.offline.learn.end_to_end import prediction_divergence
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, reader_tensors, use_grouped_experts
from vllm_milo.offline.source.whole_model import load_source_model

SIZES = {
    "hidden_size": 192,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 256,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is active, and how many lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._held:
            self._held[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._held.pop(key)


def step_peak(module: Any, run: Any, windows: int, hidden: int, dtype: torch.dtype) -> int:
    """The most bytes of a forward and backward pass of a layer."""
    parameters = [parameter.requires_grad_(True) for parameter in module.parameters() if parameter.dim() > 1]
    states, target = (torch.randn(windows, 512, hidden, dtype=dtype) for _ in "ab")
    with LiveBytes() as live, sdpa_kernel(SDPBackend.MATH):
        loss = (run(states).float() - target.float()).square().mean()
        torch.autograd.grad(loss, parameters)
    return live.peak


@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 768}, {"num_experts_per_tok": 4}, {"head_dim": 128}])
def test_a_step_of_a_layer(tmp_path: Path, changes: dict[str, int]):
    """Bytes of a token: what two windows more take. 16 bits and plain attention, as on a GPU."""
    reader = ModelReader(make_model("mixtral", tmp_path / "model", **SIZES | changes))
    tensors = reader_tensors(reader.load, reader.tensors)
    model = StreamedModel(reader.folder, reader.family, tensors, torch.device("cpu"), torch.bfloat16)
    model.begin(torch.zeros(2, 512, dtype=torch.int64))
    module = model.layer(0)
    peaks = [
        step_peak(module, lambda part: model.run(0, module, part), windows, 192, torch.bfloat16) for windows in (2, 4)
    ]
    layer = next(layer for layer in reader.layers if layer.matrices)
    shape = shape_of(reader, layer)
    predicted = saved_bytes(shape, "cuda", 2) + passing_bytes(shape, "cuda", 2)
    assert 0.95 * predicted / memory.SLACK < (peaks[1] - peaks[0]) / 1024 < predicted * memory.SLACK
    assert (peaks[1] - peaks[0]) / 1024 > predicted / 1.3


def test_a_step_of_the_whole_model(tmp_path: Path):
    folder = make_model("mixtral", tmp_path / "model", vocab_size=4096, **SIZES)
    reader = ModelReader(folder)
    models = [load_source_model(folder, torch.bfloat16).requires_grad_(False) for _ in "ab"]
    for one in models:
        use_grouped_experts(one)
    parameters = [p.requires_grad_(True) for n, p in models[0].named_parameters() if p.dim() > 1 and "layers" in n]
    ids = torch.randint(3, 4096, (8, 512))
    with LiveBytes() as live, sdpa_kernel(SDPBackend.MATH):
        torch.autograd.grad(prediction_divergence(models[0], models[1], ids), parameters)
    shapes = [shape_of(reader, layer) for layer in reader.layers if layer.matrices]
    predicted = logit_bytes("cuda", 2) * 4096 + sum(saved_bytes(shape, "cuda", 2) for shape in shapes)
    assert predicted / 1.3 < live.peak / ids.numel() < predicted * memory.SLACK
    assert memory.tuning_need(reader, "cuda") > live.peak


def test_three_streams_are_held_at_most(tmp_path: Path):
    reader = ModelReader(make_model("mixtral", tmp_path / "model", **SIZES))
    tensors = reader_tensors(reader.load, reader.tensors)
    model = StreamedModel(reader.folder, reader.family, tensors, torch.device("cpu"), torch.float32)
    windows = torch.randint(3, 256, (96, 128))
    with LiveBytes() as live:
        stream = SequentialPass(model, reader.family, windows, batch=1, full=False)
        for index in range(2):
            stream.visit(index).leave([])
    one = windows.numel() * 192 * 4
    layer = 4 * memory._largest(reader)
    assert live.peak < memory.STREAMS * one + 2 * layer + 0.5 * one
