"""Speculative decoding gives the greedy answers: by n-grams, draft models, and layers that predict further tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vllm_runner
from folder_edits import edit_config, edit_tensors
from tiny_families import make_family
from vllm_jobs import DTYPE, assert_same_answers, job

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
TOKENS = {"num_speculative_tokens": 3}


def answers(folder: Path, tmp_path: Path, kind: str, mend_router: bool = False, **engine) -> list[dict]:
    (tmp_path / kind).mkdir()
    todo = job({"model": folder}, dtype=DTYPE, quantization="milo", **engine)
    found = vllm_runner.run(todo | {"rounds": 1, "mend_router": mend_router}, tmp_path / kind)["model"]
    assert "error" not in found, found
    return found[0]


def test_n_grams_and_draft_models(checkpoints: dict[str, Path], bundled_model: Path, tmp_path: Path):
    """Drafts of an unquantized model with the same vocabulary, and of a MiLo checkpoint, here the model itself."""
    folder = checkpoints["bundled"]
    plain = answers(folder, tmp_path, "plain")
    drafts = {
        "n-grams": {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1},
        "unquantized": {"model": str(bundled_model)},
        "milo": {"model": str(folder)},
    }
    for kind, draft in drafts.items():
        found = answers(folder, tmp_path, kind, speculative_config=draft | TOKENS)
        assert_same_answers(plain, found, tolerance=2e-3 if DTYPE == "float32" else 0.3)


def add_layer_ahead(folder: Path) -> None:
    """Give a tiny GLM-4.5 a layer that predicts a further token: a decoder layer with what makers put around it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        last, ahead = "model.layers.1.", "model.layers.2."
        layer = {name.removeprefix(last): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
        embedding = tensors["model.embed_tokens.weight"]
        norm = torch.ones(embedding.shape[1], dtype=embedding.dtype)
        layer |= {name: norm.clone() for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
        layer["eh_proj.weight"] = torch.randn(len(norm), 2 * len(norm), dtype=embedding.dtype) / 16
        layer |= {
            "embed_tokens.weight": embedding.clone(),
            "shared_head.head.weight": tensors["lm_head.weight"].clone(),
        }
        tensors |= {ahead + name: tensor for name, tensor in layer.items()}

    edit_tensors(folder, "model.safetensors", edit)
    edit_config(folder, num_nextn_predict_layers=1)


def test_layers_that_predict_further_tokens(tmp_path: Path):
    """They stay as they are, and vLLM serves them unquantized beside the model."""
    source = make_family("glm4_moe", tmp_path / "source")
    add_layer_ahead(source)
    conversion = Conversion(Recipe(max_rounds=1), parse_policies("dense=16,sparse=8"))
    folder = convert(source, tmp_path / "milo", conversion, progress=False).out
    plain = answers(folder, tmp_path, "plain", mend_router=True)
    ahead = {"method": "mtp", "num_speculative_tokens": 1}
    found = answers(folder, tmp_path, "mtp", mend_router=True, speculative_config=ahead)
    assert_same_answers(plain, found, tolerance=2e-3 if DTYPE == "float32" else 0.3)
    assert "SpeculativeConfig(method='mtp'" in (tmp_path / "mtp" / "vllm.log").read_text()
