"""A model that runs a layer at a time, and the two streams of states that go through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_edits import edit_tensors
from refusals import WEIGHTS
from safetensors.torch import save_file
from tiny_models import FAMILIES, VOCABULARY
from transformers import AutoModelForCausalLM

from vllm_milo.offline.calibration.sequential import SequentialPass
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, place_tensor, reader_tensors

CPU = torch.device("cpu")


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (5, 32), generator=torch.Generator().manual_seed(0))


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    reader = ModelReader(folder)
    return StreamedModel(folder, reader.family, reader_tensors(reader.load_finite, reader.tensors), CPU, dtype)


@torch.no_grad()
def whole(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """States before each layer and after the last one, and the logits."""
    states: list[torch.Tensor] = []
    watched = [*model.model.layers, model.model.norm]
    hooks = [part.register_forward_pre_hook(lambda _, args: states.append(args[0].clone())) for part in watched]
    logits = model(windows).logits
    for hook in hooks:
        hook.remove()
    return [*states, logits]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_whole_model(family: str, sources: dict[str, Path], windows: torch.Tensor):
    """With rotary positions, causal masks and biases; in batches that do not divide the windows."""
    model, expected = streamed(sources[family]), whole(load(sources[family]), windows)
    states = model.begin(windows)
    assert len(model) == 2
    assert close(states, expected[0])
    for index in range(len(model)):
        module = model.layer(index)
        states = model.advance(index, module, states, 2)
        model.drop(module)
        assert all(parameter.is_meta for parameter in module.parameters())
        assert close(states, expected[index + 1]), index
    assert close(model.head()(states), expected[-1])


def test_fused_experts_of_files_are_placed(sources: dict[str, Path], source: Path, windows: torch.Tensor):
    state = {name: tensor.contiguous().bfloat16() for name, tensor in load(source).state_dict().items()}
    assert any(tensor.dim() == 3 for tensor in state.values())
    save_file(state, source / WEIGHTS, metadata={"format": "pt"})
    states = []
    for folder in (sources["mixtral"], source):
        model = streamed(folder)
        states.append(model.advance(0, model.layer(0), model.begin(windows), 8))
    assert torch.equal(*states)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_quantized_stream_sees_the_layers_before(family: str, sources: dict[str, Path], windows: torch.Tensor):
    reader, changed = ModelReader(sources[family]), load(sources[family])
    expected = whole(changed, windows)
    stream = SequentialPass(streamed(sources[family]), reader.family, windows, batch=2)
    visit = stream.visit(0)
    assert close(visit.target, expected[1])
    assert stream.quantized is stream.original
    matrices = [matrix for matrix in reader.matrices if matrix.name.startswith("model.layers.0.")]
    loaded = visit.loaded(matrices)
    for (matrix, values), given in zip(loaded, matrices, strict=True):
        assert matrix is given
        assert values.shape == (matrix.n, matrix.k)
        assert torch.equal(values, reader.load_finite(f"{matrix.name}.weight").float())
    weights = {matrix: values + 0.02 * torch.randn(values.shape) for matrix, values in loaded}
    visit.leave(weights.items())
    assert all(parameter.is_meta for parameter in visit.module.parameters())

    held = {reader.family.checkpoint_name(name): p.data for name, p in changed.named_parameters()}
    for matrix, values in weights.items():
        place_tensor(reader.family, f"{matrix.name}.weight", held)[1].copy_(values)
    after = whole(changed, windows)
    assert not close(after[1], expected[1])
    assert close(stream.original, expected[1])
    assert close(stream.quantized, after[1])
    visit = stream.visit(1)
    assert close(visit.target, expected[2])
    rows = changed.model.layers[1].input_layernorm(after[1]).detach().flatten(0, 1)
    total = visit.moments.by_name["model.layers.1.self_attn.q_proj"].total
    assert close(total, rows.mT @ rows)
    visit.leave([])
    assert close(stream.quantized, after[2])


def test_token_ids_beyond_the_embedding_are_refused(sources: dict[str, Path], windows: torch.Tensor):
    windows[1, 3] = VOCABULARY
    with pytest.raises(ConversionError, match=r"token id 256, but model\.embed_tokens\.weight has 256 rows"):
        streamed(sources["mixtral"]).begin(windows)


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.o_proj.weight", "mlp.gate.weight"])
def test_missing_tensors_are_named(sources: dict[str, Path], name: str):
    reader = ModelReader(sources["qwen2_moe"])
    names = [tensor for tensor in reader.tensors if not tensor.endswith(f"1.{name}")]
    assert len(names) == len(reader.tensors) - 1
    model = StreamedModel(reader.folder, reader.family, reader_tensors(reader.load_finite, names), CPU, torch.float32)
    model.layer(0)
    with pytest.raises(ConversionError, match=rf"layers\.1: transformers needs .*{name}.*--calibration none"):
        model.layer(1)


def test_missing_embeddings_are_named(sources: dict[str, Path], windows: torch.Tensor):
    reader = ModelReader(sources["mixtral"])
    model = StreamedModel(reader.folder, reader.family, lambda prefix: [], CPU, torch.float32)
    with pytest.raises(ConversionError, match=r"model\.embed_tokens\.weight: missing"):
        model.begin(windows)


def test_unknown_tensors_are_named(source: Path):
    names = [f"model.layers.{index}.self_attn.q_norm.weight" for index in range(2)]
    edit_tensors(source, WEIGHTS, lambda tensors: tensors.update({name: torch.ones(64) for name in names}))
    model = streamed(source)
    for index, name in enumerate(names):
        with pytest.raises(
            ConversionError, match=f"{name}: transformers has no such parameter; use --calibration none"
        ):
            model.layer(index)
