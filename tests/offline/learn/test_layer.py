"""Training one layer's quantized state on what the layer puts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from vllm_milo.offline.batches import batches
from vllm_milo.offline.calibration.layer_moments import NoMoments
from vllm_milo.offline.calibration.sequential import SequentialPass, Visit
from vllm_milo.offline.learn import groups as groups_module
from vllm_milo.offline.learn import layer as layer_module
from vllm_milo.offline.learn.groups import MIN_TOKENS, Group, make_groups
from vllm_milo.offline.learn.latents import Pace, Rates
from vllm_milo.offline.learn.layer import ALONE, LearnOptions, LearnReport, Spread, in_rounds, learn_layer
from vllm_milo.offline.nouns import Kind, Matrix, Recipe
from vllm_milo.offline.solve.methods import Solved, quantize_matrices
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, reader_tensors

CPU = torch.device("cpu")
RECIPE = Recipe(group_size=64, max_rounds=1)
OPTIONS = LearnOptions(steps=24, batch=8, rates=Rates(codes=0.02, scale=2e-3, zero=0.01, factors=8e-3))


class Setting(NamedTuple):
    """A layer of a model in memory, and what the solver made of its matrices."""

    stream: SequentialPass
    visit: Visit
    solved: dict[Matrix, Solved]

    def learn(
        self, options: LearnOptions = OPTIONS, spread: Spread = ALONE
    ) -> tuple[dict[Matrix, Solved], LearnReport]:
        visit, model = self.visit, self.stream.model
        what = (self.solved, self.stream.quantized, visit.target, visit.moments.tokens, RECIPE.factor_bits)
        return learn_layer(model, visit.index, visit.module, *what, options, spread)


def prepare(folder: Path, windows: torch.Tensor, ranks: Any = lambda matrix: 8, index: int = 0) -> Setting:
    reader = ModelReader(folder)
    tensors = reader_tensors(reader.load_finite, reader.tensors)
    stream = SequentialPass(StreamedModel(folder, reader.family, tensors, CPU, torch.float32), reader.family, windows)
    for before in range(index):
        stream.visit(before).leave([])
    visit = stream.visit(index)
    matrices = [matrix for matrix in reader.matrices if matrix.name.startswith(f"model.layers.{index}.")]
    wanted = {matrix.name: ranks(matrix) for matrix in matrices}
    solved: dict[Matrix, Solved] = {}
    for batch in batches(visit.loaded(matrices), NoMoments(), wanted):
        theirs = [wanted[matrix.name] for matrix in batch.matrices]
        result = quantize_matrices(batch.weights, theirs, RECIPE, torch.bfloat16)
        for place, (matrix, rank) in enumerate(zip(batch.matrices, theirs, strict=True)):
            solved[matrix] = result.one(place, rank)
    return Setting(stream, visit, solved)


@pytest.fixture
def windows(trained_tokens: torch.Tensor) -> torch.Tensor:
    return trained_tokens[: 64 * 128].view(64, 128)


@torch.no_grad()
def kept_apart(setting: Setting, weights: dict[Matrix, Solved]) -> float:
    """The loss on every sixteenth window, each token's error by the energy of its own output."""
    held = setting.stream.parameters(setting.visit.index, setting.visit.module)
    for matrix, one in weights.items():
        setting.stream.model.place(f"{matrix.name}.weight", held)[1].copy_(one.dequantize())
    states, target = (part[15::16] for part in (setting.stream.quantized, setting.visit.target))
    error = setting.stream.model.run(setting.visit.index, setting.visit.module, states).double() - target.double()
    return float((error.square().mean(-1) / target.double().square().mean(-1)).mean())


def as_bytes(one: Solved) -> bytes:
    tensors = [*one.base]
    for factor in one.pair or ():
        tensors += [factor.values, *([] if factor.scale is None else [factor.scale])]
    return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


@pytest.mark.parametrize("index", [0, 2])
def test_learning_lowers_the_loss_on_windows_kept_apart(bundled_model: Path, windows: torch.Tensor, index: int):
    setting = prepare(bundled_model, windows, index=index)
    learned, report = setting.learn()
    assert learned.keys() == setting.solved.keys()
    assert report.before == pytest.approx(kept_apart(setting, setting.solved), rel=1e-3)
    assert report.after == pytest.approx(kept_apart(setting, learned), rel=1e-3)
    assert report.after < 0.92 * report.before
    for matrix, one in learned.items():
        given = setting.solved[matrix]
        assert one.rank == given.rank == 8
        for mine, theirs in zip([*one.base, *one.pair.u], [*given.base, *given.pair.u], strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)


def test_what_does_not_help_is_undone(bundled_model: Path, windows: torch.Tensor):
    setting = prepare(bundled_model, windows[:16])
    wild = LearnOptions(steps=3, batch=4, rates=Rates(codes=4.0, scale=0.5, zero=4.0, factors=1.0))
    learned, report = setting.learn(wild)
    assert report.after == report.before
    assert learned.keys() == setting.solved.keys()
    assert all(learned[matrix] is one for matrix, one in setting.solved.items())
    # the module holds what came of the steps until the layer is left with the solver's weights
    setting.visit.leave((matrix, one.dequantize()) for matrix, one in learned.items())
    again = prepare(bundled_model, windows[:16])
    again.visit.leave((matrix, one.dequantize()) for matrix, one in again.solved.items())
    assert torch.equal(setting.stream.quantized, again.stream.quantized)


def test_the_same_seed_gives_the_same_bytes(bundled_model: Path, windows: torch.Tensor):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))  # the state of torch's own generator does not count
        learned, _ = prepare(bundled_model, windows[:32]).learn(LearnOptions(steps=4, batch=4, seed=seed))
        found.append({matrix.name: as_bytes(one) for matrix, one in learned.items()})
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_experts_of_few_tokens_keep_their_codes(bundled_model: Path, windows: torch.Tensor):
    setting = prepare(bundled_model, windows)
    tokens = setting.visit.moments.tokens
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        tokens[f"model.layers.0.mlp.experts.3.{leaf}"] = MIN_TOKENS - 1
        tokens[f"model.layers.0.mlp.experts.4.{leaf}"] = MIN_TOKENS
    few = {name for name, number in tokens.items() if number < MIN_TOKENS}
    assert 3 <= len(few) < 30
    learned, report = setting.learn()
    assert report.after < report.before
    assert set(report.untrained_experts) == few
    for matrix, one in learned.items():
        same = as_bytes(one) == as_bytes(setting.solved[matrix])
        assert same == (matrix.name in few), matrix.name


def test_few_windows_are_checked_on_themselves(bundled_model: Path, windows: torch.Tensor):
    setting = prepare(bundled_model, windows[:2])
    _, report = setting.learn(LearnOptions(steps=16, batch=8, rates=OPTIONS.rates))
    assert report.after < report.before


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_groups_hold_what_they_are_given(family: str, sources: dict[str, Path], windows: torch.Tensor):
    """Ragged ranks, some 0; fused experts' gates and ups in one parameter, whose other half they leave alone."""
    setting = prepare(sources[family], windows[:2] % 256, lambda m: 8 * ((m.expert or 0) % 3), index=1)
    model, visit = setting.stream.model, setting.visit
    own = dict(visit.module.named_parameters())
    parameters = {name: own[mine] for name, mine in model.parameters(1, visit.module).items()}
    groups = make_groups(model.place, parameters, setting.solved, {}, RECIPE.factor_bits)
    assert sorted(m for group in groups for m in group.matrices) == sorted(setting.solved)
    routed = [group for group in groups if group.matrices[0].kind is Kind.ROUTED_EXPERT]
    assert len(routed) == 3
    assert all([m.expert for m in group.matrices] == list(range(len(group.matrices))) for group in routed)
    for group in groups:
        group.write()
    for matrix, view in visit.loaded(list(setting.solved)):
        assert torch.allclose(view, setting.solved[matrix].dequantize(), atol=1e-5), matrix.name
    for group in groups:
        for matrix, one in group.stored().items():
            assert one.rank == setting.solved[matrix].rank
            assert as_bytes(one) == as_bytes(setting.solved[matrix]), matrix.name
    first, pace = routed[0], Pace(CPU)
    pace.set(10, 20)
    before = first.parameter.data.clone()
    first.step(torch.randn(before.shape), Rates(codes=1.0), pace)
    changed = (first.parameter.data != before).any(-1).all(0)
    assert int(changed.sum()) == first.matrices[0].n
    ranks = [one.rank for one in first.stored().values()]
    assert ranks == [8 * (expert % 3) for expert in range(len(ranks))]


def test_experts_in_pieces_that_lie_elsewhere(bundled_model: Path, windows: torch.Tensor, monkeypatch):
    """One piece for all experts of a role, eight, and eight whose state lies on another device, as if it did."""
    whole, report = prepare(bundled_model, windows).learn(spread=Spread(devices=[CPU, CPU]))
    expected = {matrix: as_bytes(one) for matrix, one in whole.items()}
    assert report.after < report.before
    monkeypatch.setattr(groups_module, "PIECE_WEIGHTS", 1)
    brought, real = [], Group._bring
    monkeypatch.setattr(Group, "_bring", lambda self, place: brought.append(self) or real(self, place))
    for elsewhere in (False, True):
        if elsewhere:
            assert all(group._elsewhere is None for group in brought)
            brought.clear()
            monkeypatch.setattr(Group, "is_elsewhere", True)
        found, again = prepare(bundled_model, windows).learn()
        assert again == report
        assert {matrix: as_bytes(one) for matrix, one in found.items()} == expected
    experts = {len(group.matrices) for group in brought if group.matrices[0].kind is Kind.ROUTED_EXPERT}
    assert experts == {2}
    assert all(group._elsewhere is not None for group in brought)


def test_rounds_share_the_experts_out(bundled_model: Path):
    matrices = [m for m in ModelReader(bundled_model).matrices if m.name.startswith("model.layers.0.")]
    for rounds, sizes in ((1, [12]), (2, [6, 6]), (4, [3] * 4), (8, [2] * 6), (5, [3] * 4), (16, [1] * 12)):
        parts = in_rounds(matrices, rounds)
        assert sorted(m for part in parts for m in part) == sorted(matrices)
        assert [len({m.expert for m in part} - {None}) for part in parts] == sizes
        assert all(m.expert is not None for part in parts[1:] for m in part)


def test_a_round_that_does_not_help_keeps_the_solvers_result(bundled_model: Path, windows: torch.Tensor, monkeypatch):
    """The second of two; what the first learned stays, and the layer holds both."""
    setting, losses = prepare(bundled_model, windows), []
    real = layer_module._Training.run

    def run(self, groups):
        before, after = real(self, groups)
        losses.append((before, after))
        return before, before + 1 if len(losses) == 2 else after

    monkeypatch.setattr(layer_module._Training, "run", run)
    learned, report = setting.learn(spread=Spread(rounds=2))
    assert report.after == losses[1][0]
    assert report.before == pytest.approx(sum(before for before, _ in losses) - losses[0][1])
    kept = {m.expert for m, one in learned.items() if as_bytes(one) == as_bytes(setting.solved[m])}
    assert kept >= set(range(6, 12))
    for matrix, view in setting.visit.loaded(list(learned)):
        assert torch.allclose(view, learned[matrix].dequantize(), atol=1e-5), matrix.name
