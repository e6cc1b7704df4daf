"""MiLo checkpoints in transformers: the packed model computes what the dequantized one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHECKPOINT_FORMATS
from readme import readme_snippets
from tiny_families import TINY, has_class, make_family
from tiny_models import VOCABULARY, make_prompts
from transformers import AutoModel, AutoModelForCausalLM

from vllm_milo.huggingface.modules import MiLoExperts, MiLoLinear
from vllm_milo.kernels import ops
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.families.table import FAMILIES
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.shards import read_tensors
from vllm_milo.validation import quantized_modules

WINDOWS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
RUN = [name for name in TINY if has_class(name) and name not in ("kimi_k2", "qwen3_omni_moe", "gpt_oss")]
"""Families that transformers knows by their ``model_type``, and runs as a whole."""


def ragged(source: Path, **options) -> Conversion:
    """A conversion whose experts have many ranks, some 0."""
    counts: dict[str, list[int]] = {}
    for matrix in ModelReader(source).matrices:
        if matrix.experts is not None and matrix.expert is not None:
            counts[matrix.experts] = [7 * expert % 16 for expert in range(matrix.expert + 1)]
    policies = parse_policies("dense=16,frequency=16")
    return Conversion(Recipe(max_rounds=1, group_size=128), policies, expert_counts=counts, **options)


def ranks(folder: Path) -> set[int]:
    found = quantized_modules(read_tensors(folder)).values()
    return {tensors["weight_v"].shape[0] if "weight_v" in tensors else 0 for tensors in found}


@torch.no_grad()
def logits(model, windows: torch.Tensor = WINDOWS) -> torch.Tensor:
    return model(input_ids=windows).logits


def assert_same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def layers_of(model, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", RUN)
def test_every_family_computes_what_its_weights_stand_for(name: str, tmp_path: Path):
    source = make_family(name, tmp_path / "source")
    out = convert(source, tmp_path / "out", ragged(source), progress=False).out
    assert {0, 16} < ranks(out)
    found: Any = AutoModelForCausalLM
    if FAMILIES[name].text_config:  # which is more than a causal language model
        found = getattr(transformers, json.loads((out / "config.json").read_text())["architectures"][0])
    model, said = found.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not said["unexpected_keys"]
    assert not said["missing_keys"]
    assert layers_of(model, MiLoExperts)
    assert_same(logits(model), logits(load_model(out)))


@pytest.mark.parametrize("name", CHECKPOINT_FORMATS)
def test_every_format_of_factors_and_groups(name: str, checkpoints: dict[str, Path]):
    assert len(ranks(checkpoints[name])) > 2
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32)
    assert_same(logits(model), logits(load_model(checkpoints[name])))


def test_without_compensators(sources: dict[str, Path], tmp_path: Path):
    out = convert(sources["mixtral"], tmp_path / "out", Conversion(Recipe(max_rounds=1)), progress=False).out
    assert ranks(out) == {0}
    assert_same(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), logits(load_model(out)))


def test_kept_layers_and_experts_stay_as_they_are(sources: dict[str, Path], tmp_path: Path):
    source = sources["qwen3_moe"]
    kept = ["model.layers.1.mlp.experts", "model.layers.0.self_attn.o_proj"]
    out = convert(source, tmp_path / "out", ragged(source, ignore=kept), progress=False).out
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert len(layers_of(model, MiLoExperts)) == 1
    assert not isinstance(model.model.layers[0].self_attn.o_proj, MiLoLinear)
    assert_same(logits(model), logits(load_model(out)))


def test_a_model_without_its_head(checkpoints: dict[str, Path]):
    whole = AutoModelForCausalLM.from_pretrained(checkpoints["mixtral"], dtype=torch.float32)
    part = AutoModel.from_pretrained(checkpoints["mixtral"], dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(part(WINDOWS).last_hidden_state, whole.model(WINDOWS).last_hidden_state)


def test_weights_stay_packed(checkpoints: dict[str, Path]):
    """In memory the model takes what its files do."""
    folder = checkpoints["bundled"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert model.get_memory_footprint() < 1.02 * stored
    logits(model)
    assert model.get_memory_footprint() < 1.02 * stored


def test_casting_a_model_leaves_what_is_packed(checkpoints: dict[str, Path]):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2_moe"])
    assert model.dtype is torch.bfloat16
    rounded = logits(model)
    model.to(torch.float32)
    assert_same(logits(model), logits(load_model(checkpoints["qwen2_moe"])), 0.05)  # biases were rounded
    assert {tensor.dtype for tensor in model.model.layers[0].self_attn.q_proj.packed.buffers()} <= {
        torch.int32,
        torch.int8,
        torch.float16,
    }
    assert_same(rounded.float(), logits(model), 0.05)


def test_generates_what_the_dequantized_model_does(checkpoints: dict[str, Path]):
    folder = checkpoints["bundled"]
    prompt = torch.tensor([make_prompts(folder, (24,))[0]])
    found, wanted = (
        model.generate(prompt, max_new_tokens=12, do_sample=False)
        for model in (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_model(folder))
    )
    assert found.shape == (1, 36)
    assert torch.equal(found, wanted)


def test_triton_computes_the_same_and_says_where_its_layout_ends(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    """The kernels' layout takes the packed one's place when the backend of the device asks for it."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints["mixtral"], dtype=torch.float16
    )  # bf16 is wrong interpreted
    tokens = WINDOWS[:1, :3]
    wanted = logits(model, tokens).float()
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "triton")
    ops.choose_backend.cache_clear()
    assert_same(logits(model, tokens).float(), wanted, 0.02)
    monkeypatch.setenv(ops.BACKEND_VARIABLE, "torch")
    ops.choose_backend.cache_clear()
    with pytest.raises(RuntimeError, match=r"laid out for its kernels, and cannot be used .* on cpu: load the check"):
        logits(model, tokens)
    monkeypatch.undo()
    ops.choose_backend.cache_clear()


@pytest.mark.parametrize(
    "imports", ["import vllm_milo, transformers", "import transformers.modeling_utils, vllm_milo", "import vllm_milo"]
)
def test_in_whichever_order_they_are_imported(imports: str):
    code = f"{imports}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print(m['milo'].__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "MiLoHfQuantizer", done.stderr


def test_transformers_is_not_imported_for_it():
    code = "import vllm_milo, sys; print({'torch', 'transformers', 'vllm_milo.checkpoint'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr


def test_snippet_of_the_readme(checkpoints: dict[str, Path], tmp_path: Path):
    (snippet,) = [code for code in readme_snippets() if "from_pretrained" in code]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny-milo").symlink_to(checkpoints["bundled"])
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("In the morning the old man")
    assert len(done.stdout) > 40
