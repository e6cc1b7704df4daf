"""Sources with fewer than 16 bits a weight: values to the bit; what is refused of config, headers and values."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_edits import edit_config, edit_tensors
from quantized_sources import WAYS, WEIGHTS, Tensors, Written, write_both
from refusals import FAST, Q_PROJ, refused
from safetensors.torch import load_file
from tiny_families import make_family
from tiny_models import make_model

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.source.formats.encoding import Encoding
from vllm_milo.offline.source.formats.scheme import Scheme
from vllm_milo.offline.source.formats.settings import find_schemes
from vllm_milo.offline.source.formats.table import FINE_FP8, MXFP4
from vllm_milo.offline.source.parts import on_device, read_part
from vllm_milo.offline.source.reader import ModelReader

CPU = torch.device("cpu")
PACKED = "packed int4 groups with zero points"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("deepseek_v3", tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Written]:
    """Writes a small model in a way; each test has its own to break."""
    plain = make_model("qwen3_moe", tmp_path / "plain", num_experts=2)
    return lambda way: write_both(plain, tmp_path / "written", WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_values_are_those_of_the_reference(model: Path, tmp_path: Path, way: str):
    """Of compressed-tensors, and of loops over blocks, ragged ones too: all tensors, and headers, as the copy's."""
    found = write_both(model, tmp_path, WAYS[way])
    reader, plain = ModelReader(found.source), ModelReader(found.copy)
    expected = load_file(found.copy / WEIGHTS)
    assert reader.tensors.keys() == expected.keys()
    assert len(reader.source.view.encodings) == 28
    assert reader.matrices == plain.matrices
    for name, values in expected.items():
        assert reader.tensors[name][1:] == plain.tensors[name][1:]
        got = reader.load(name)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, values), name
    ragged = reader.tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"].shape
    assert ragged == (576, 128)  # four and a half blocks


def test_fp8_blocks_as_transformers_reads_them():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = torch.randn(256, 384).to(torch.float8_e4m3fn)
    for scale in (torch.rand(2, 3) + 0.1, (torch.rand(2, 3) + 0.1).bfloat16()):
        expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
        tensors = {"weight": codes, "weight_scale_inv": scale}
        scheme = Scheme(FINE_FP8, (128, 128))
        assert torch.equal(scheme.format.dequantize(tensors, scheme).bfloat16(), expected)


def test_fp4_as_transformers_reads_it():
    """gpt-oss has the same codes and scales, [E, N, G, 16] and [E, N, G]; all codes, and exponents at both ends."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (1, 64, 4, 16), dtype=torch.uint8)
    exponents = torch.randint(0, 254, (1, 64, 4), dtype=torch.uint8)
    exponents[0, 0] = torch.tensor([0, 1, 252, 251], dtype=torch.uint8)
    scheme = Scheme(MXFP4, (1, 32), 4)
    tensors = {"weight_packed": blocks[0].flatten(1), "weight_scale": exponents[0]}
    expected = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)[0].T
    assert torch.equal(scheme.format.dequantize(tensors, scheme), expected)


def test_a_model_in_another_dtype(written: Callable[[str], Written]):
    """Values get the dtype that config.json states, after compressed-tensors' own."""
    source = written("packed int4 rows").source
    edit_config(source, dtype="float32")
    reader = ModelReader(source)
    assert reader.dtype == torch.float32
    assert reader.tensors[Q_PROJ].dtype == "F32"
    values = reader.load(Q_PROJ)
    assert values.dtype == torch.float32
    assert torch.equal(values, values.bfloat16().float())


def test_parts_go_to_other_processes(written: Callable[[str], Written]):
    source = written(PACKED).source
    reader = ModelReader(source)
    for matrix in reader.layers[1].matrices[:3]:
        part = pickle.loads(pickle.dumps(reader.part(matrix)))
        assert torch.equal(on_device(read_part(part), CPU), reader.load(matrix.tensor))


def edit_weights(folder: Path, **changes: Any) -> None:
    """Change what config.json says of weights in compressed-tensors' only group."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            "awq",
            r"quantized already \(awq\); .*: 16 bits, float32, FP8 e4m3 \(quant_method fp8\), .* gpt-oss's MXFP4",
        ),
        ({"quant_method": "quark"}, r"quantized already \(quark\); convert the original, or a copy in a format"),
        ({"quant_method": ["fp8"]}, r"quantized already \(\['fp8'\]\)"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"fmt is 'e5m2', which is not e4m3"),
        ({"quant_method": "fp8", "fmt": []}, r"fmt is \[\], which is not e4m3"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            r"weight_block_size must be the sizes of a block, found \[128",
        ),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "must be the sizes of a block"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config is .*, which changes what weights are",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "transform_config is .*, which changes what weights are",
        ),
        ({"quant_method": "compressed-tensors"}, "config_groups must be an object of groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": []}},
            r"config_groups\.a\.weights must be an object",
        ),
    ],
)
def test_unknown_configs(stated: Any, message: str):
    with pytest.raises(ConversionError, match=rf"^config\.json: .*{message}"):
        find_schemes({"quantization_config": stated}, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 3}, r"num_bits is 3; of pack-quantized \(4, 8\) are read"),
        ({"num_bits": True}, "num_bits is True"),
        ({"type": "float"}, "is in the format 'pack-quantized' of the type 'float'"),
        ({"type": {}}, "of the type {}"),
        ({"symmetric": "no"}, "symmetric is 'no', which pack-quantized is not read with"),
        ({"strategy": "block"}, r"strategy is 'block'; of INT \(compressed-tensors\) channel, group are read"),
        ({"strategy": [], "group_size": 2.5}, r"group_size must be the sizes of a block, found \[1, 2\.5\]"),
        ({"group_size": 0}, r"group_size must be the sizes of a block, found \[1, 0\]"),
    ],
)
def test_unknown_groups(written: Callable[[str], Written], tmp_path: Path, changes: dict[str, Any], message: str):
    source = written(PACKED).source
    edit_weights(source, **changes)
    refused(
        source, tmp_path / "out", rf"config\.json: quantization_config: config_groups\.group_0.*{message}.*read: 16"
    )


def test_sides_of_blocks_as_older_versions_wrote_them(model: Path, tmp_path: Path):
    found = write_both(model, tmp_path, WAYS["float blocks"])
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    for sides in ("64x128", [64, 128]):
        edit_weights(found.source, block_structure=sides)
        assert torch.equal(ModelReader(found.source).load(name), load_file(found.copy / WEIGHTS)[name])
    edit_weights(found.source, block_structure="64x")
    with pytest.raises(ConversionError, match=r"weights\.block_structure must be the sizes of a block, found '64x'"):
        ModelReader(found.source)


def test_the_groups_of_a_model_with_several(written: Callable[[str], Written], tmp_path: Path):
    """Exact names before patterns before all linear layers; a pattern need not match the end of a name."""
    found = written("packed int4 groups of 32")
    other = write_both(tmp_path / "plain", tmp_path / "other", WAYS["float channel"])
    experts = load_file(other.source / WEIGHTS)

    def mix(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        tensors.update({name: tensor for name, tensor in experts.items() if ".experts." in name})

    edit_tensors(found.source, WEIGHTS, mix)
    packed, floats = (WAYS[way].config for way in ("packed int4 groups of 32", "float channel"))
    group = floats["config_groups"]["group_0"] | {"format": "float-quantized", "targets": [r"re:.*mlp\.experts\.\d+"]}
    groups = packed["config_groups"] | {"group_1": group}
    edit_config(found.source, quantization_config=packed | {"format": "mixed-precision", "config_groups": groups})
    refused(found.source, tmp_path / "out", r"config_groups\.group_0 is in the format 'mixed-precision'")
    edit_config(found.source, quantization_config=packed | {"config_groups": groups})
    reader = ModelReader(found.source)
    for name, copy in (("mlp.experts.1.up_proj", other.copy), ("self_attn.k_proj", found.copy)):
        name = f"model.layers.1.{name}.weight"
        assert torch.equal(reader.load(name), load_file(copy / WEIGHTS)[name])
    of_both = ["FP8 e4m3 (compressed-tensors), a scale for a row"]
    of_both.append("INT4 (compressed-tensors), a scale for 32 weights of a row")
    assert reader.source.view.format == "; ".join(of_both)
    del groups["group_1"]
    edit_config(found.source, quantization_config=packed | {"config_groups": groups})
    message = r"experts\.0\.down_proj\.weight_scale belongs to no matrix as config\.json describes them \(INT4"
    with pytest.raises(ConversionError, match=message):
        ModelReader(found.source)


BROKEN_HEADERS: dict[str, tuple[str, Callable[[Tensors, str], Any], str]] = {
    "no scale": (
        "fp8 blocks",
        lambda t, q: t.pop(f"{q}_scale_inv"),
        r"q_proj\.weight_scale_inv: missing, and by config",
    ),
    "no zero points": (PACKED, lambda t, q: t.pop(f"{q}_zero_point"), r"q_proj\.weight_zero_point: missing"),
    "no shape": (PACKED, lambda t, q: t.pop(f"{q}_shape"), r"q_proj\.weight_shape: missing"),
    "no codes": (
        PACKED,
        lambda t, q: t.pop(f"{q}_packed"),
        r"belongs to no matrix as config\.json .*_packed is missing",
    ),
    "fewer scales": (
        "fp8 blocks",
        lambda t, q: t.update({f"{q}_scale_inv": torch.ones(1, 1)}),
        r"model\.safetensors: tensor .*q_proj\.weight_scale_inv is F32 \[1, 1\], but of 256x128 weights .* \[2, 1\]",
    ),
    "scales of another dtype": (
        "float channel",
        lambda t, q: t.update({f"{q}_scale": torch.ones(256, 1, dtype=torch.int32)}),
        r"q_proj\.weight_scale is I32 \[256, 1\], but of 256x128 weights .* must be F32 or BF16 or F16 \[256, 1\]",
    ),
    "codes without rows": (
        PACKED,
        lambda t, q: t.update({f"{q}_packed": torch.zeros(0, 16, dtype=torch.int32)}),
        r"tensor .*q_proj\.weight_packed must have 2 dimensions, found \[0, 16\]",
    ),
    "in 16 bits with scales": (
        "fp8 blocks",
        lambda t, q: t.update({q: t[q].bfloat16()}),
        r"q_proj\.weight_scale_inv belongs to no matrix as config\.json describes them \(FP8 e4m3\): .* is BF16",
    ),
    "there twice": (
        PACKED,
        lambda t, q: t.update({q: torch.ones(256, 128, dtype=torch.bfloat16)}),
        r"q_proj\.weight_packed: the matrix is there twice, as model\.layers\.0\.self_attn\.q_proj\.weight too",
    ),
    "zero points of a symmetric scheme": (
        "packed int4 rows",
        lambda t, q: t.update({f"{q}_zero_point": torch.ones(32, 1, dtype=torch.int32)}),
        r"q_proj\.weight_zero_point belongs to no matrix as config\.json .*: no zero points",
    ),
}
BROKEN_VALUES: dict[str, tuple[str, Callable[[Tensors, str], Any], str]] = {
    "zero": (
        "fp8 blocks",
        lambda t, q: t[f"{q}_scale_inv"].view(-1)[1].zero_(),
        "weight_scale_inv holds a scale that is 0",
    ),
    "nan": (
        "fp8 matrix",
        lambda t, q: t[f"{q}_scale"].fill_(math.nan),
        "weight_scale holds a scale that is NaN or Inf",
    ),
    "inf": (
        "float channel",
        lambda t, q: t[f"{q}_scale"][3].fill_(math.inf),
        "weight_scale holds a scale that is NaN or",
    ),
    "nan exponent": ("mxfp4", lambda t, q: t[f"{q}_scale"][3].fill_(255), "weight_scale holds a scale that is NaN"),
    "nan code": ("fp8 blocks", lambda t, q: t[q].view(torch.uint8)[1].fill_(127), "weight holds NaN or Inf"),
    "shape": (PACKED, lambda t, q: t[f"{q}_shape"].copy_(torch.tensor([256, 127])), r"weight_shape says \[256, 127\]"),
    "order": (
        PACKED,
        lambda t, q: t.update({f"{q}_g_idx": torch.arange(128, dtype=torch.int32) % 2}),
        r"weight_g_idx: the columns are not in the order of their groups",
    ),
}


@pytest.mark.parametrize("case", [*BROKEN_HEADERS, *BROKEN_VALUES])
def test_broken_tensors(written: Callable[[str], Written], tmp_path: Path, case: str):
    way, edit, message = (BROKEN_HEADERS | BROKEN_VALUES)[case]
    source = written(way).source
    edit_tensors(source, WEIGHTS, lambda tensors: edit(tensors, Q_PROJ))
    refused(source, tmp_path / "out", message if case in BROKEN_HEADERS else rf"model\.safetensors.*q_proj\.{message}")
    if case in BROKEN_HEADERS:
        with pytest.raises(ConversionError, match=message):
            ModelReader(source)


@pytest.mark.parametrize("groups", [torch.arange(128) // 64, torch.full((128,), -1)])
def test_columns_in_the_order_of_their_groups(written: Callable[[str], Written], groups: torch.Tensor):
    """Tools write that too; -1 is what stands there before there is an order."""
    found = written(PACKED)
    edit_tensors(found.source, WEIGHTS, lambda tensors: tensors.update({f"{Q_PROJ}_g_idx": groups.int()}))
    assert torch.equal(ModelReader(found.source).load(Q_PROJ), load_file(found.copy / WEIGHTS)[Q_PROJ])


def test_scales_of_what_milo_leaves_in_16_bits(written: Callable[[str], Written], tmp_path: Path):
    found = written("fp8 blocks")

    def add(tensors: Tensors) -> None:
        for layer in range(2):
            module = f"model.layers.{layer}.self_attn"
            tensors |= {f"{module}.q_proj.input_scale": torch.ones(()), f"{module}.k_scale": torch.ones(())}

    edit_tensors(found.source, WEIGHTS, add)
    summary = convert(found.source, tmp_path / "out", Conversion(FAST), progress=False)
    assert [warning for warning in summary.warnings if "left out" in warning] == [
        "2 tensors input_scale are left out: static scales of activations, which MiLo leaves in 16 bits",
        "2 tensors k_scale are left out: scales of the attention's cache, which MiLo leaves in 16 bits",
    ]
    assert not [
        name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path) if "k_scale" in name
    ]


def test_a_model_in_16_bits_whose_config_says_otherwise(written: Callable[[str], Written], tmp_path: Path):
    """As who casts a model may leave it."""
    copy = written("fp8 blocks").copy
    edit_config(copy, quantization_config=WAYS["fp8 blocks"].config)
    reader = ModelReader(copy)
    assert reader.source.view.format is None
    assert not reader.source.view.encodings


def test_a_block_larger_than_the_matrix():
    scheme = Scheme(FINE_FP8, (128, 128))
    tensors = {"weight": torch.full((3, 5), 2.0).to(torch.float8_e4m3fn), "weight_scale_inv": torch.tensor([[0.5]])}
    assert torch.equal(scheme.format.dequantize(tensors, scheme), torch.ones(3, 5))
    encoding = Encoding(scheme, (3, 5), "float16", {})
    assert encoding.scheme.scales(3, 5) == (1, 1)
