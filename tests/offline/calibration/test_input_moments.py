"""Second moments of a layer's inputs against direct computation in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM

from vllm_milo.offline.calibration import input_moments
from vllm_milo.offline.calibration.input_moments import UNSEEN, InputMoments, Moment
from vllm_milo.offline.errors import ConversionError
from vllm_milo.offline.nouns import Kind, Matrix, Moments, Recipe
from vllm_milo.offline.solve.methods import quantize_matrices
from vllm_milo.offline.source.reader import ModelReader

CPU = torch.device("cpu")
LAYER = 1
NAME = f"model.layers.{LAYER}."


class Setting:
    """A tiny model, and the moments of its second layer's inputs on some windows."""

    def __init__(self, folder: Path, windows: torch.Tensor, full: bool = True, broken: float | None = None) -> None:
        self.reader = ModelReader(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.layer = self.model.model.layers[LAYER]
        self.moments = InputMoments(self.layer, NAME, self.reader.family, full)
        if broken is not None:
            self.layer.mlp.experts.gate_up_proj.data[2, 0, 0] = broken
            self.layer.input_layernorm.weight.data[3] = broken
        self.run(windows)
        self.moments.close()
        self.matrices = {m.name: m for m in self.reader.matrices if m.name.startswith(NAME)}

    @torch.no_grad()
    def run(self, windows: torch.Tensor) -> None:
        for part in windows.split(2):
            self.model(part)

    def of(self, name: str) -> torch.Tensor:
        return self.moments.of([self.matrices[name]], CPU).inputs[0]


def random_windows(number: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (number, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def reference(folder: Path, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows that each matrix of the layer reads, those of routed experts times their router weight; float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")  # grouped products know no float64
    layer, config = model.model.layers[LAYER], model.config
    seen = {}
    for name, part in {"in": layer, "o": layer.self_attn.o_proj, "mlp": layer.mlp}.items():
        part.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2)))
    model(windows)

    rows = {f"self_attn.{leaf}_proj": layer.input_layernorm(seen["in"]) for leaf in "qkv"}
    rows["self_attn.o_proj"] = seen["o"]
    states = seen["mlp"]
    probabilities = (states @ layer.mlp.gate.weight.mT).softmax(-1)
    mixtral = config.model_type == "mixtral"
    weights, index = probabilities.topk(config.num_experts_per_tok)
    if mixtral or config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    experts, leaves = ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate", "up", "down"))
    suffix = "" if mixtral else "_proj"
    for expert, fused in enumerate(layer.mlp.experts.gate_up_proj):
        gate, up = fused.chunk(2)
        weight = torch.where(index == expert, weights, 0.0).sum(-1, keepdim=True)
        chosen = (index == expert).any(-1)
        inner = torch.nn.functional.silu(states @ gate.mT) * (states @ up.mT)
        for leaf, values in zip(leaves, (states, states, inner), strict=True):
            rows[f"{experts}.experts.{expert}.{leaf}{suffix}"] = (values * weight)[chosen]
    if not mixtral:
        shared = layer.mlp.shared_expert
        rows["mlp.shared_expert.gate_proj"] = rows["mlp.shared_expert.up_proj"] = states
        inner = torch.nn.functional.silu(shared.gate_proj(states)) * shared.up_proj(states)
        rows["mlp.shared_expert.down_proj"] = inner
    return {NAME + name: values for name, values in rows.items()}


def expected(rows: torch.Tensor) -> torch.Tensor:
    """The moment of mean diagonal 1, correlations shrunk."""
    total, (number, size) = rows.mT @ rows, rows.shape
    shrunk = (number * total + size * total.diagonal().diag()) / (number + size)
    return shrunk / shrunk.diagonal().mean()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_moments_are_those_of_the_inputs(family: str, sources: dict[str, Path]):
    windows = random_windows()
    setting, rows = Setting(sources[family], windows), reference(sources[family], windows)
    assert rows.keys() == setting.matrices.keys()
    for name, values in rows.items():
        moment = setting.moments.by_name[name]
        assert moment.rows == len(values), name
        found = setting.of(name).double()
        assert torch.allclose(found, expected(values), rtol=1e-3, atol=1e-4), name
        assert setting.moments.numbers(setting.matrices[name]) == values.shape[1] ** 2
        routed = setting.matrices[name].kind is Kind.ROUTED_EXPERT
        assert setting.moments.tokens.get(name) == (len(values) if routed else None)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_diagonals_alone(family: str, sources: dict[str, Path]):
    windows = random_windows()
    whole, part = Setting(sources[family], windows), Setting(sources[family], windows, full=False)
    for name in whole.matrices:
        assert part.of(name).dim() == 1
        assert torch.allclose(part.of(name), whole.of(name).diagonal(), rtol=1e-4), name


def test_wide_inputs_have_diagonals(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(input_moments, "MAX_FULL_SIZE", 128)
    windows = random_windows()
    setting, rows = Setting(sources["qwen2_moe"], windows), reference(sources["qwen2_moe"], windows)
    name = f"{NAME}mlp.shared_expert.down_proj"
    assert torch.allclose(setting.of(name).double(), expected(rows[name]).diagonal(), rtol=1e-3)
    assert setting.of(f"{NAME}self_attn.q_proj").dim() == 2


def test_one_input_has_one_moment(sources: dict[str, Path]):
    setting = Setting(sources["qwen2_moe"], random_windows())
    by_name, matrices = setting.moments.by_name, setting.matrices
    qkv = [matrices[f"{NAME}self_attn.{leaf}_proj"] for leaf in "qkv"]
    assert len({id(by_name[matrix.name]) for matrix in qkv}) == 1
    assert setting.moments.of(qkv, CPU).inputs.shape == (1, 128, 128)
    assert setting.moments.of(qkv[:2], CPU) is setting.moments.of(qkv[1:2], CPU)  # kept, not made again
    gate, up, down = (f"{NAME}mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down"))
    assert by_name[gate] is by_name[up]
    assert by_name[gate] is not by_name[down]
    assert by_name[gate] is not by_name[qkv[0].name]
    experts = [matrices[f"{NAME}mlp.experts.{expert}.gate_proj"] for expert in range(3)]
    assert setting.moments.of(experts, CPU).inputs.shape == (3, 128, 128)
    # square experts: shapes alone would put gates and downs into one batch
    groups = {setting.moments.group(matrices[f"{NAME}mlp.experts.0.{leaf}_proj"]) for leaf in ("gate", "down")}
    assert len(groups) == 2
    assert len({setting.moments.group(matrix) for matrix in qkv}) == 1


def test_large_experts_share_the_moment_of_their_input(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(input_moments, "MAX_EXPERT_BYTES", 4 * 128**2 * 4 - 1)
    windows = random_windows()
    setting, rows = Setting(sources["mixtral"], windows), reference(sources["mixtral"], windows)
    gates, downs = ([f"{NAME}block_sparse_moe.experts.{e}.{leaf}" for e in range(4)] for leaf in ("w1", "w2"))
    assert len({id(setting.moments.by_name[name]) for name in gates}) == 1
    assert len({id(setting.moments.by_name[name]) for name in downs}) == 4
    both = torch.cat([rows[name] for name in gates])
    assert torch.allclose(setting.of(gates[0]).double(), expected(both), rtol=1e-3, atol=1e-4)


def test_experts_that_saw_nothing_have_the_identity(sources: dict[str, Path]):
    setting = Setting(sources["mixtral"], random_windows(1, 1))
    tokens = setting.moments.tokens
    unseen = [name for name, number in tokens.items() if number == 0]
    assert len(unseen) == 2 * 3  # two of four experts see the one token
    for name in unseen:
        assert torch.allclose(setting.of(name), torch.eye(128)), name


def test_watching_ends(sources: dict[str, Path]):
    setting = Setting(sources["mixtral"], random_windows())
    before = {name: moment.rows for name, moment in setting.moments.by_name.items()}
    setting.run(random_windows())
    assert before == {name: moment.rows for name, moment in setting.moments.by_name.items()}


def test_correlations_shrink_and_the_diagonal_stays():
    moment, rows = Moment(16), torch.randn(4, 16)
    moment.add(rows[:1])
    moment.add(rows[1:].view(3, 1, 16))
    plain, found = (rows.double().mT @ rows.double()), moment.shrunk(CPU).double()
    off = ~torch.eye(16, dtype=torch.bool)
    assert torch.allclose(found.diagonal(), plain.diagonal(), rtol=1e-5)
    assert torch.allclose(found[off], plain[off] * (4 / 20), rtol=1e-4, atol=1e-6)
    assert torch.equal(Moment(4).shrunk(CPU), UNSEEN * torch.eye(4))
    assert torch.linalg.eigvalsh(found).min() > 0  # of fewer rows than columns


def test_an_expert_that_the_text_never_reaches_is_quantized_by_plain_squares():
    moment = Moment(64).shrunk(CPU)[None]
    weights = torch.randn(1, 64, 64)
    with_moments, without = (
        quantize_matrices(weights, 8, Recipe(max_rounds=3), torch.bfloat16, given)
        for given in (Moments(moment, moment), Moments())
    )
    assert float(with_moments.errors) < 1.1 * float(without.errors)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(sources: dict[str, Path], broken: float, full: bool):
    setting = Setting(sources["mixtral"], random_windows(), full, broken)
    for name in ("self_attn.q_proj", "block_sparse_moe.experts.2.w2"):
        with pytest.raises(ConversionError, match=rf"layers\.1\.{name}: .* hold NaN or Inf.*--calibration none"):
            setting.of(NAME + name)


def test_a_matrix_that_never_ran_is_named(sources: dict[str, Path]):
    setting = Setting(sources["mixtral"], random_windows(1, 4))
    other = Matrix(f"{NAME}self_attn.kv_b_proj", Kind.ATTENTION, 128, 128)
    with pytest.raises(ConversionError, match=r"kv_b_proj: the calibration found no such module"):
        setting.moments.of([other], CPU)
    assert setting.moments.numbers(other) == 0
