"""gpt-oss as OpenAI publishes it: experts in MXFP4, those of a layer together, rows of gate and up in turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folder_edits import edit_tensors
from refusals import FAST, WEIGHTS, refused
from safetensors.torch import load_file, save_file
from tiny_families import make_family

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.verify import verify_checkpoint
from vllm_milo.offline.source.parts import on_device
from vllm_milo.offline.source.reader import ModelReader

CPU = torch.device("cpu")
SHARD = "model-00001-of-00001.safetensors"
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [E, N, K/32, 16] and exponents uint8 [E, N, K/32] of values [E, K, N], by plain loops over blocks."""
    rows = values.float().mT.unflatten(-1, (-1, 32))
    exponents = (rows.abs().amax(-1).clamp(min=2.0**-100) / 6).log2().ceil()
    scaled = rows / exponents.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - torch.tensor(FP4)).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponents + 127).to(torch.uint8)


def decode(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The values [E, K, N] of :func:`encode`, by a table of FP4's values."""
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    both = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()
    return (table[both] * 2.0 ** (exponents.float().unsqueeze(-1) - 127)).flatten(-2).mT.contiguous().bfloat16()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model in MXFP4, and what it stands for in bfloat16."""
    root = tmp_path_factory.mktemp("gpt_oss")
    stored, copy = (make_family("gpt_oss", root / name) for name in ("stored", "copy"))
    tensors, values = {}, {}
    for name, tensor in load_file(copy / WEIGHTS).items():
        if tensor.dim() != 3:
            tensors[name] = values[name] = tensor
            continue
        codes, exponents = encode(tensor)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
        values[name] = decode(codes, exponents)
    save_file(tensors, stored / WEIGHTS, metadata={"format": "pt"})
    save_file(values, copy / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return stored, copy


def test_matrices_are_every_other_row_of_what_is_stored(both: tuple[Path, Path]):
    stored, copy = map(ModelReader, both)
    whole = load_file(both[1] / WEIGHTS)
    assert stored.matrices == copy.matrices
    assert stored.tensors.keys() == copy.tensors.keys() == whole.keys()
    for reader in (stored, copy):
        for name in reader.tensors:
            assert torch.equal(reader.load(name), whole[name]), name
        for layer in reader.layers:
            for source in (source for source in layer.matrices if source.expert is not None):
                values = whole[source.tensor][source.expert].T
                part = {"gate_proj": values[0::2], "up_proj": values[1::2], "down_proj": values}
                expected = part[source.matrix.name.rpartition(".")[2]]
                assert (source.matrix.n, source.matrix.k) == expected.shape
                assert torch.equal(on_device(reader.load_matrix(source), CPU), expected), source.matrix.name


def test_both_give_the_same_checkpoint(both: tuple[Path, Path], tmp_path: Path):
    outs = [convert(source, tmp_path / source.name, Conversion(FAST), progress=False).out for source in both]
    one, other = (load_file(out / SHARD) for out in outs)
    assert one.keys() == other.keys()
    assert any(name.endswith("experts.gate_up_proj_bias") for name in one)
    for name, values in one.items():
        assert torch.equal(values, other[name]), name
    recipe = json.loads((outs[0] / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["source_format"] == "MXFP4 (gpt-oss), a scale for 32 weights of a row"
    for source in both:
        verdict = verify_checkpoint(outs[0], source)
        assert verdict.good, verdict.problems


def test_square_experts_are_told_apart(tmp_path: Path):
    """Those of the real models are 2880 by 2880: their shape does not say which side is which."""
    import tiny_families

    square = tiny_families.TINY["gpt_oss"]._replace(
        config=tiny_families.TINY["gpt_oss"].config | {"intermediate_size": 128}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_families.TINY, "gpt_oss", square)
        reader = ModelReader(make_family("gpt_oss", tmp_path / "source"))
    whole = load_file(tmp_path / "source" / WEIGHTS)
    source = next(s for layer in reader.layers for s in layer.matrices if s.matrix.name.endswith("experts.1.down_proj"))
    assert torch.equal(on_device(reader.load_matrix(source), CPU), whole[source.tensor][1].T)


PLACE = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{PLACE}_scales"), rf"{PLACE}_scales: missing; are the model's files complete"),
        (lambda t: t.pop(f"{PLACE}_blocks"), rf"{PLACE}_blocks: missing; are the model's files complete"),
        (
            lambda t: t.update({f"{PLACE}_scales": t[f"{PLACE}_scales"][:, :64].clone()}),
            rf"{PLACE}_scales is U8 \[4, 64, 6\], but MXFP4 .* exponents \[experts, N, K/32\]",
        ),
        (lambda t: t[f"{PLACE}_scales"].fill_(255), rf"{PLACE}_scales holds a scale that is NaN"),
        (lambda t: t.update({PLACE: torch.zeros(1)}), rf"{PLACE} is there twice, in MXFP4 too"),
    ],
)
def test_broken_files_are_refused(both: tuple[Path, Path], tmp_path: Path, edit, message: str):
    source = make_family("gpt_oss", tmp_path / "source")
    tensors = load_file(both[0] / WEIGHTS)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    (source / "config.json").write_bytes((both[0] / "config.json").read_bytes())
    edit_tensors(source, WEIGHTS, edit)
    refused(source, tmp_path / "out", message)
