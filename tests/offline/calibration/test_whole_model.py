"""Moments measured on a text: every matrix has them, and they foretell what an error costs."""

from __future__ import annotations

from pathlib import Path

import torch

from vllm_milo.offline.calibration.whole_model import calibrate
from vllm_milo.offline.calibration.windows import spread_windows
from vllm_milo.offline.solve.metric import metric_of
from vllm_milo.offline.source.reader import ModelReader


def test_calibration_sees_every_matrix_and_leaves_the_model_as_it_was(
    bundled_model: Path, trained_model, trained_tokens
):
    window = trained_tokens[:128]
    before = trained_model(input_ids=window[None]).logits
    found = calibrate(trained_model, window[None])
    assert torch.equal(trained_model(input_ids=window[None]).logits, before)
    assert {m.name for m in ModelReader(bundled_model).matrices} == set(found.inputs) == set(found.outputs)
    experts = [found.inputs[f"model.layers.0.mlp.experts.{e}.down_proj"].rows for e in range(12)]
    assert sum(experts) == 3 * 128
    assert found.tokens == 128


def test_moments_foretell_the_loss_of_an_error(bundled_model: Path, trained_model, trained_tokens):
    """½·tr(G·E·R·Eᵀ) is about the rise in loss per token that a small random error makes.

    It leaves out that the error of one matrix acts on all tokens of a window alike, so it falls short here by two.
    """
    reader = ModelReader(bundled_model)
    found = calibrate(trained_model, spread_windows(trained_tokens, 8))
    ids = spread_windows(trained_tokens[len(trained_tokens) // 2 :], 8)
    matrix = next(m for m in reader.matrices if m.name == "model.layers.1.self_attn.o_proj")
    weight = trained_model.get_parameter(f"{matrix.name}.weight")
    original = weight.detach().clone()

    @torch.inference_mode()
    def divergence(change: torch.Tensor) -> float:
        before = trained_model(input_ids=ids).logits.log_softmax(-1)
        weight.data.add_(change)
        after = trained_model(input_ids=ids).logits.log_softmax(-1)
        weight.data.copy_(original)
        return float((before.exp() * (before - after)).sum(-1).mean())

    change = 0.1 * original.std() * torch.randn(original.shape)
    moments = found.of([matrix], torch.device("cpu"))
    expected = 0.5 * float(metric_of(moments).cost(change[None]))
    assert 1 / 3 < divergence(change) / expected < 3
