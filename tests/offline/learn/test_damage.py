"""What replacing weights does to the output of a layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY

from vllm_milo.offline.learn.damage import Damage
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, reader_tensors

CPU = torch.device("cpu")


def prepare(folder: Path) -> tuple[StreamedModel, torch.nn.Module, Damage, torch.Tensor]:
    """The last layer of a model, and states before it, taken to be the embeddings."""
    reader = ModelReader(folder)
    model = StreamedModel(folder, reader.family, reader_tensors(reader.load_finite, reader.tensors), CPU, torch.float32)
    states = model.begin(torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0)))
    module = model.layer(1)
    return model, module, Damage(model, 1, module, states, batch=2), states


@pytest.mark.parametrize("family", FAMILIES)
def test_damage_is_the_error_by_the_outputs_energy_and_weights_come_back(family: str, sources: dict[str, Path]):
    model, module, damage, states = prepare(sources[family])
    before = {name: values.clone() for name, values in module.state_dict().items()}
    place = module.self_attn.v_proj.weight.data
    experts = module.mlp.experts.down_proj.data
    assert damage.of([(place, place.clone())]) == 0
    changed = place + 0.02 * torch.randn(place.shape)
    found = damage.of([(place, changed)])
    assert found > 0
    assert damage.of((view, view + 0.02 * torch.randn(view.shape)) for view in experts) > 0
    assert all(torch.equal(values, before[name]) for name, values in module.state_dict().items())

    own = model.advance(1, module, states, 1)
    place.copy_(changed)
    error = (model.advance(1, module, states, 1) - own).square().mean(-1) / own.square().mean(-1)
    assert found == pytest.approx(float(error.mean()), rel=1e-4)


def test_weights_come_back_after_a_failure(sources: dict[str, Path]):
    _, module, damage, _ = prepare(sources["mixtral"])
    place = module.self_attn.q_proj.weight.data
    before = place.clone()

    def failing():
        yield place, torch.zeros_like(place)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        damage.of(failing())
    assert torch.equal(place, before)
