"""Second moments foretold by the weights: against float64, against measured ones, and what they do for a conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folder_edits import edit_tensors
from tiny_models import FAMILIES, TEXT, make_model
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.quantized_model import QuantizedModel
from vllm_milo.offline.batches import batches
from vllm_milo.offline.calibration import gram
from vllm_milo.offline.calibration.gram import LayerGrams, WeightMoments
from vllm_milo.offline.calibration.moment_source import PlainSquares
from vllm_milo.offline.calibration.text_moments import Calibration
from vllm_milo.offline.calibration.whole_model import calibrate
from vllm_milo.offline.calibration.windows import spread_windows
from vllm_milo.offline.checkpoint.inspect import inspect_checkpoint
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.nouns import Kind, LoadedMatrix, Matrix, Recipe
from vllm_milo.offline.solve.metric import metric_of
from vllm_milo.offline.source.layers import Layer
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.tokens import read_tokens

CPU = torch.device("cpu")


def unit(moment: torch.Tensor) -> torch.Tensor:
    return moment / moment.diagonal().mean()


def mixed(moment: torch.Tensor, share: float) -> torch.Tensor:
    return (1 - share) * unit(moment) + share * torch.eye(len(moment), dtype=moment.dtype)


class Reference:
    """The same moments in float64, from the modules that transformers builds of the same files."""

    def __init__(self, folder: Path, layer: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.config = self.model.config
        self.layer = self.model.model.layers[layer]
        self.attention = self.layer.self_attn
        norms = (self.layer.input_layernorm, self.layer.post_attention_layernorm)
        self.before_attention, self.before_ffn = (norm.weight.detach().diag() for norm in norms)

    def ffns(self) -> list[tuple[bool, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(routed, gate, up, down) of every FFN of the layer."""
        block, found = self.layer.mlp, []
        if hasattr(block, "experts"):
            for fused, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
                found.append((True, *fused.detach().chunk(2), down.detach()))
        dense = getattr(block, "shared_expert", block)
        if hasattr(dense, "gate_proj"):
            parts = (dense.gate_proj, dense.up_proj, dense.down_proj)
            found.append((False, *(part.weight.detach() for part in parts)))
        return found

    def ffn_gram(self) -> torch.Tensor:
        total = 0
        for routed in (True, False):
            grams = [gate.mT @ gate + up.mT @ up for kind, gate, up, _ in self.ffns() if kind is routed]
            if grams:
                total = total + unit(sum(grams))
        return total

    def ffn(self) -> torch.Tensor:
        return mixed(self.ffn_gram(), 0.25)

    def qkv(self) -> torch.Tensor:
        readers = [getattr(self.attention, f"{leaf}_proj").weight.detach() for leaf in "qkv"]
        own = unit(sum(unit(w.mT @ w) for w in readers))
        streams = []
        for moment, norm in ((own, self.before_attention), (self.ffn_gram(), self.before_ffn)):
            streams.append(unit(norm.inverse() @ moment @ norm.inverse()))
        return mixed(self.before_attention @ sum(streams) @ self.before_attention, 0.25)

    def heads(self) -> torch.Tensor:
        values, output = self.attention.v_proj.weight.detach(), self.attention.o_proj.weight.detach()
        query, key_value = self.config.num_attention_heads, self.config.num_key_value_heads
        size = len(values) // key_value
        rows = [values[(head * key_value // query) * size :][:size] for head in range(query)]
        written = torch.cat(rows)
        return mixed(unit(output.mT @ output) + unit(written @ written.mT), 0.5)

    def inner(self, index: int) -> torch.Tensor:
        _, gate, up, down = self.ffns()[index]
        written = unit(gate @ gate.mT) * unit(up @ up.mT)
        return mixed(unit(down.mT @ down) + unit(written), 0.5)

    def of(self, matrix: Matrix) -> torch.Tensor:
        leaf = matrix.name.rpartition(".")[2]
        if leaf == "o_proj":
            return self.heads()
        if matrix.kind is Kind.ATTENTION:
            return self.qkv()
        if leaf in ("w2", "down_proj"):
            return self.inner(-1 if matrix.expert is None else matrix.expert)
        return self.ffn()


def find(reader: ModelReader, index: int) -> Layer:
    return next(layer for layer in reader.layers if layer.name == f"model.layers.{index}")


def load(folder: Path, index: int) -> tuple[list[LoadedMatrix], LayerGrams]:
    reader = ModelReader(folder)
    layer = find(reader, index)
    loaded = list(reader.load_layer(layer, CPU))
    return loaded, WeightMoments().of_layer(reader, layer, loaded)


@pytest.fixture(scope="module")
def measured(bundled_model: Path) -> Calibration:
    return calibrate(load_model(bundled_model), spread_windows(read_tokens(bundled_model, TEXT), 16))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_formulas(family: str, layer: int, sources: dict[str, Path]):
    """With and without shared experts, dense layers, grouped queries, biases."""
    loaded, grams = load(sources[family], layer)
    reference = Reference(sources[family], layer)
    for matrix, _ in loaded:
        found = grams.of([matrix], CPU)
        assert found.outputs is None
        assert found.inputs.shape == (1, matrix.k, matrix.k)
        assert torch.allclose(found.inputs[0].double(), reference.of(matrix), rtol=1e-4, atol=1e-5), matrix.name


def test_signs_of_norms_count(sources: dict[str, Path], tmp_path: Path):
    """A norm's weight may be negative or 0."""
    folder = make_model("mixtral", tmp_path / "model")

    def edit(tensors):
        tensors["model.layers.0.input_layernorm.weight"][::3] *= -1

    edit_tensors(folder, "model.safetensors", edit)
    query = Matrix("model.layers.0.self_attn.q_proj", Kind.ATTENTION, 256, 128)
    found, reference = load(folder, 0)[1].of([query], CPU).inputs[0], Reference(folder, 0).qkv()
    assert torch.allclose(found.double(), reference, rtol=1e-4, atol=1e-5)
    edit_tensors(folder, "model.safetensors", lambda tensors: tensors["model.layers.0.input_layernorm.weight"].zero_())
    assert torch.isfinite(load(folder, 0)[1].of([query], CPU).inputs).all()


def test_they_foretell_what_a_text_gives(bundled_model: Path, measured: Calibration):
    """Deviations from the identity point the same way; of random weights they would be orthogonal."""

    def deviation(moment: torch.Tensor) -> torch.Tensor:
        return unit(moment) - torch.eye(len(moment))

    cosines: dict[str, list[float]] = {}
    for index in range(4):
        loaded, grams = load(bundled_model, index)
        for matrix, _ in loaded:
            found = deviation(grams.of([matrix], CPU).inputs[0])
            expected = deviation(measured.of([matrix], CPU).inputs[0])
            cosine = float((found * expected).sum() / found.norm() / expected.norm())
            cosines.setdefault(grams.group(matrix), []).append(cosine)
    means = {activation: sum(values) / len(values) for activation, values in cosines.items()}
    assert len(means) == 4
    assert all(mean > 0.12 for mean in means.values()), means
    assert sum(means.values()) / 4 > 0.3, means


def test_batches_hold_what_reads_one_activation(sources: dict[str, Path]):
    """Experts are square here, so that shapes alone would not tell gates from downs."""
    loaded, grams = load(sources["mixtral"], 0)
    seen = []
    for batch in batches(loaded, grams, {}):
        groups = {grams.group(matrix) for matrix in batch.matrices}
        assert len(groups) == 1
        own = "inner activations" in groups.pop()
        assert len(batch.moments.inputs) == (len(batch.matrices) if own else 1)
        assert all((grams.numbers(matrix) > 0) is own for matrix in batch.matrices)
        seen += [matrix.name for matrix in batch.matrices]
    assert sorted(seen) == sorted(matrix.name for matrix, _ in loaded)


def test_wide_activations_have_none(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gram, "MAX_FULL_SIZE", 128)
    loaded, grams = load(sources["qwen2_moe"], 1)
    wide = [matrix for matrix, _ in loaded if matrix.k == 256]
    assert [matrix.name.rpartition(".")[2] for matrix in wide] == ["down_proj"]  # the shared expert's
    for matrix, _ in loaded:
        assert (grams.of([matrix], CPU).inputs is None) == (matrix in wide)
    conversion = Conversion(Recipe(max_rounds=1), budget_bits=3.8, calibration=WeightMoments())
    convert(sources["qwen2_moe"], tmp_path / "out", conversion, progress=False)
    assert 3.5 < inspect_checkpoint(tmp_path / "out")["bits_per_weight"] <= 3.8


@pytest.mark.parametrize("ignored", ["v_proj", "q_proj,k_proj,v_proj", "mlp.shared_expert.gate_proj", "o_proj"])
def test_what_is_ignored_is_left_out(ignored: str, sources: dict[str, Path]):
    reader = ModelReader(sources["qwen2_moe"])
    loaded, grams = load(sources["qwen2_moe"], 1)
    kept = [(matrix, w) for matrix, w in loaded if not matrix.name.endswith(tuple(ignored.split(",")))]
    assert len(kept) < len(loaded)
    part = WeightMoments().of_layer(reader, find(reader, 1), kept)
    changed = 0
    for matrix, _ in kept:
        found, whole = part.of([matrix], CPU).inputs, grams.of([matrix], CPU).inputs
        assert float(found[0].diagonal().mean()) == pytest.approx(1, rel=1e-4)
        changed += not torch.allclose(found, whole, atol=1e-3)
    assert changed > 0 or ignored == "o_proj"


def test_layers_without_a_norm_or_with_other_projections_are_named(sources: dict[str, Path]):
    reader = ModelReader(sources["mixtral"])
    loaded, grams = load(sources["mixtral"], 0)
    del reader.tensors["model.layers.0.post_attention_layernorm.weight"]
    with pytest.raises(ConversionError, match=r"model\.layers\.0\.post_attention_layernorm\.weight: missing"):
        WeightMoments().of_layer(reader, find(reader, 0), loaded)
    other = Matrix("model.layers.0.self_attn.kv_b_proj", Kind.ATTENTION, 128, 128)
    with pytest.raises(ConversionError, match=r"kv_b_proj: nothing is known .*use --calibration none"):
        grams.group(other)


def loss(folder: Path, out: Path, source: WeightMoments | PlainSquares, measured: Calibration) -> float:
    """The loss that errors cost by measured moments and gradients, thousandths of a nat."""
    recipe = Recipe(group_size=128, max_rounds=6, feedback_rounds=2)
    convert(folder, out, Conversion(recipe, budget_bits=3.6, calibration=source), progress=False)
    model = QuantizedModel(folder, "cpu")
    model.load(out)
    errors = {name: view - model.source[name] for name, view in model.views.items()}
    return 500 * sum(
        float(metric_of(measured.of([matrix], CPU)).cost(errors[name][None])) for name, matrix in model.matrices.items()
    )


def test_they_lower_the_loss_at_equal_bits(bundled_model: Path, tmp_path: Path, measured: Calibration):
    weighed = loss(bundled_model, tmp_path / "a", WeightMoments(), measured)
    plain = loss(bundled_model, tmp_path / "b", PlainSquares(), measured)
    assert weighed < 0.95 * plain
