"""Every family of the table on a tiny model: what is quantized, what is kept, and that both compute the same."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import TINY, has_class, learns, make_family
from tiny_models import VOCABULARY

from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.divergence import open_streamed
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.evaluation.verify import verify_checkpoint
from vllm_milo.offline.families.table import FAMILIES
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Kind, Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.shards import read_tensors
from vllm_milo.validation import quantized_modules, validate_checkpoint

SHARD = "model-00001-of-00001.safetensors"
UNIFORM = Conversion(Recipe(max_rounds=1, group_size=128), parse_policies("uniform=16"))
WINDOWS = torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
TWINS = {"gemma4_text", "llama4_text", "bailing_moe_v2", "sarvam_moe", "step3_text"}
"""Families whose entry is that of another but for where it is in files."""
ALL = [pytest.param(name, marks=pytest.mark.slow) if name in TWINS else name for name in TINY]
RUN = [name for name in TINY if has_class(name) and name not in TWINS]
QUICK = {"deepseek_v3", "hy_v3", "granitemoe", "lfm2_moe"}
"""Families that show what is peculiar along a text: buffers, renamed parts, other layouts and attention."""
KEPT = {
    "qwen2_moe": {"mlp.gate", "mlp.shared_expert_gate"},
    "qwen3_next": {"mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_ba"},
    "hunyuan_v1_moe": {"mlp.gate.wg"},
    "hy_v3": {"mlp.router.gate"},
    "afmoe": {"mlp.router.gate"},
    **{name: {"mlp.router"} for name in ("gpt_oss", "aria")},
    **{
        name: {"mlp.gate", *(f"self_attn.indexer.{part}" for part in ("wq_b", "wk", "weights_proj"))}
        for name in ("deepseek_v32", "glm_moe_dsa", "hy_v4")
    },
    "glm5_next": {"mlp.gate", *(f"self_attn.indexer.{part}" for part in ("wq_b", "wk", "weights_proj"))}
    | {f"self_attn.{part}_proj" for part in ("q", "k", "v", "b", "f_a", "f_b", "g_a", "g_b", "q_a", "q_b", "kv_b", "o")}
    | {"self_attn.kv_a_proj_with_mqa"},
    **{name: {"block_sparse_moe.gate"} for name in ("mixtral", "minimax_m2", "phimoe")},
    **{
        name: {"mlp.gate", "mlp.shared_expert_gate"}
        | {f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")}
        for name in ("qwen3_5_moe", "qwen3_5_moe_text")
    },
    **{
        name: {"feed_forward.router", *(f"self_attn.{part}_proj" for part in "qkv")}
        for name in ("llama4", "llama4_text")
    },
    "longcat_flash": {"mlp.router.classifier"},
    "deepseek_v4": {"ffn.gate", "attn.wo_a", "attn.indexer.wq_b", "attn.indexer.weights_proj"}
    | {f"attn.{place}compressor.{part}" for place in ("", "indexer.") for part in ("wkv", "wgate")},
    "bailing_hybrid": {"mlp.gate", "attention.g_proj"},
    "kimi_linear": {"block_sparse_moe.gate"}
    | {f"self_attn.{part}_proj" for part in ("q", "k", "v", "b", "f_a", "f_b", "g_a", "g_b")},
    **{name: {"router.proj"} for name in ("gemma4", "gemma4_text")},
    "granitemoe": {"block_sparse_moe.router.layer"},
    "granitemoeshared": {"block_sparse_moe.router.layer", "shared_mlp.input_linear"},
    "granitemoehybrid": {"block_sparse_moe.router.layer", "shared_mlp.input_linear"}
    | {"mamba.in_proj", "mamba.out_proj"},
    "lfm2_moe": {"feed_forward.gate", "conv.in_proj", "conv.out_proj"},
    "laguna": {"mlp.gate", "self_attn.g_proj"},
    **{name: {"moe.gate", "self_attn.g_proj"} for name in ("step3p5", "step3p7")},
    **{name: {"moe.gate", *(f"self_attn.{part}_proj" for part in "qkv")} for name in ("step3_text", "step3_vl")},
    "bailing_moe_v3_vl": {"mlp.gate", *(f"attention.{part}_proj" for part in "qkvbfg")},
    "nemotron_h": {"mixer.gate", "mixer.in_proj", "mixer.out_proj"},
    "jamba": {"feed_forward.router", *(f"mamba.{part}_proj" for part in ("in", "x", "dt", "out"))},
}
"""All 2-D weights of the layers of some families that are not quantized; of the others the router alone."""


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory):
    """Returns a family's source and its checkpoint with rank 16 on every matrix; not to be changed."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def made(name: str) -> tuple[Path, Path]:
        source = make_family(name, root / "source" / name)
        return source, convert(source, root / name, UNIFORM, progress=False).out

    return made


@pytest.mark.parametrize("name", ALL)
def test_rank_16_on_every_matrix(name: str, uniform, tmp_path: Path):
    source, out = uniform(name)
    reader, fmt = ModelReader(source), validate_checkpoint(out)
    tensors = read_tensors(out)
    modules = quantized_modules(tensors)
    assert {matrix.name for matrix in reader.matrices} == modules.keys()
    assert all("weight_u" in found for found in modules.values())
    kept = {
        tensor.removesuffix(".weight").removeprefix(f"{FAMILIES[name].layer_of(tensor)}.")
        for tensor, entry in tensors.items()
        if tensor.endswith(".weight") and FAMILIES[name].layer_of(tensor) and len(entry.shape) == 2
    }
    assert kept == KEPT.get(name, {"mlp.gate"} if name not in ("mixtral", "minimax_m2") else {"block_sparse_moe.gate"})
    assert all(
        fmt.ignores(tensor.removesuffix(".weight")) for tensor in tensors if tensor.endswith(f"{min(kept)}.weight")
    )
    groups = {fmt.module_group_size(matrix.name) for matrix in reader.matrices if matrix.k % 128}
    assert groups <= {64}  # where groups of 128 do not divide the inputs
    assert inspect_checkpoint(out)["kept_weights"] == 0
    verdict = verify_checkpoint(out, source)
    assert verdict.good, verdict.problems


@pytest.mark.parametrize("name", RUN)
def test_layer_by_layer_is_as_the_whole_model(name: str, uniform):
    """Of the checkpoint, dequantized: names, buffers and what surrounds the layers are where transformers has them."""
    _, out = uniform(name)
    model, streamed = load_model(out), open_streamed(out, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        whole = model(input_ids=WINDOWS).logits
        states = streamed.begin(WINDOWS)
        for index in range(len(streamed)):
            layer = streamed.layer(index)
            states = streamed.advance(index, layer, states, batch=2)
            streamed.drop(layer)
        logits = streamed.head()(states)
    assert (logits - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("name", RUN)
def test_the_checkpoint_predicts_about_what_the_source_does(name: str, uniform):
    source, out = uniform(name)
    with torch.no_grad():
        mine, theirs = (
            torch.log_softmax(load_model(folder)(input_ids=WINDOWS).logits.double(), -1) for folder in (out, source)
        )
    divergence, shuffled = (
        float((theirs.exp() * (theirs - others)).sum(-1).mean()) for others in (mine, theirs.roll(1, dims=1))
    )
    assert 1e-5 < divergence < 0.2 * shuffled


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUN if learns(n)]
)
def test_along_a_text_within_a_budget(name: str, uniform, tmp_path: Path):
    """As by default, with little text: ranks are measured, codes learned."""
    source, _ = uniform(name)
    text = Text("random", WINDOWS, LearnOptions(steps=1, batch=2))
    recipe = Recipe(max_rounds=1, feedback_rounds=1, group_size=128)
    out = convert(source, tmp_path / "out", Conversion(recipe, budget_bits=4.0, text=text), progress=False).out
    report = json.loads((out / "milo_report.json").read_text())
    learned = {layer.name for layer in ModelReader(source).layers if layer.matrices}
    assert report["layers"].keys() == learned
    modules = quantized_modules(read_tensors(out))
    assert modules.keys() == report["matrices"].keys()
    before, after = load_file(source / "model.safetensors"), load_file(out / SHARD)
    copied = [key for key in after if key.rpartition(".")[0] not in modules]
    assert all(torch.equal(after[key], before[key]) for key in copied)
    assert any("norm" in key for key in copied)


@pytest.mark.parametrize("name", ALL)
def test_without_a_text(name: str, uniform, tmp_path: Path):
    source, _ = uniform(name)
    recipe = Recipe(max_rounds=1, group_size=128, base="hqq")
    out = convert(source, tmp_path / "out", Conversion(recipe, budget_bits=4.0), progress=False).out
    assert inspect_checkpoint(out)["bits_per_weight"] == pytest.approx(4.0, abs=0.2)


@pytest.mark.parametrize("name", ALL)
def test_kinds(name: str, uniform):
    source, _ = uniform(name)
    kinds = {matrix.kind for matrix in ModelReader(source).matrices}
    assert Kind.ROUTED_EXPERT in kinds
    assert (Kind.ATTENTION in kinds) == (name != "glm5_next")
    shared = any(slot.kind is Kind.SHARED_EXPERT for slot in FAMILIES[name].slots)
    assert (Kind.SHARED_EXPERT in kinds) is shared
