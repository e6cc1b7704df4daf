"""Perplexity: the mean over windows of what is new in each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.perplexity import perplexity


def test_perplexity_is_the_mean_over_windows_of_new_tokens(bundled_model: Path):
    model = load_model(bundled_model)
    tokens = torch.randint(3, 4096, (1000,), generator=torch.Generator().manual_seed(0))
    found = perplexity(model, tokens, window=256, stride=100)
    losses, scored = [], 0
    with torch.inference_mode():
        for start in range(0, 999, 100):
            end = min(start + 256, 1000)
            logits = model(input_ids=tokens[None, start:end]).logits[0].double().log_softmax(-1)
            new = [i for i in range(start + 1, end) if i >= max(scored, start + 1)]
            if not new:
                break
            losses.append(-sum(float(logits[i - start - 1, tokens[i]]) for i in new) / len(new))
            scored = end
    assert found.windows == len(losses)
    assert found.perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)


def test_short_windows_start_where_the_last_ended(bundled_model: Path):
    tokens = torch.arange(3, 203)
    found = perplexity(load_model(bundled_model), tokens, window=64)
    assert found.protocol.startswith("window 64, stride 64")
    assert found.windows == 4
