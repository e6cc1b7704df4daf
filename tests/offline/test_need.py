"""Ranks by what a layer's roles turn out to need, while a model is converted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY

from vllm_milo.offline.along.need import NeedMeter
from vllm_milo.offline.calibration.sequential import SequentialPass
from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Matrix, Recipe
from vllm_milo.offline.ranks.budget import stored_bits
from vllm_milo.offline.ranks.need import group_roles
from vllm_milo.offline.ranks.roles import largest_rank, share_budget
from vllm_milo.offline.served.load import held_by, serving_load
from vllm_milo.offline.source.ignore import without_ignored
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import StreamedModel, reader_tensors
from vllm_milo.shards import read_tensors
from vllm_milo.validation import quantized_modules, read_format

RECIPE = Recipe(group_size=128, max_rounds=1, feedback_rounds=1)
BUDGET = 3.7
WINDOWS = torch.randint(0, VOCABULARY, (9, 48), generator=torch.Generator().manual_seed(0))
CONVERSION = Conversion(RECIPE, budget_bits=BUDGET, text=Text("random", WINDOWS, LearnOptions(steps=2, batch=2)))


def matrices_of(folder: Path) -> list[Matrix]:
    reader = ModelReader(folder)
    layers = (without_ignored(layer, reader.family.ignore) for layer in reader.layers)
    return [source.matrix for layer in layers for source in layer.matrices]


def ranks_of(out: Path) -> dict[str, int]:
    """The rank of each matrix by the rows of its factors."""
    modules = quantized_modules(read_tensors(out))
    return {name: held["weight_u"].shape[0] if "weight_u" in held else 0 for name, held in modules.items()}


def layers_of(names: dict[str, int]) -> dict[str, dict[str, int]]:
    return {f"layers.{index}": {n: r for n, r in names.items() if f".layers.{index}." in n} for index in range(2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_share_the_budget_and_the_table_says_what_is_stored(
    family: str, sources: dict[str, Path], tmp_path: Path
):
    matrices = matrices_of(sources[family])
    planned, _ = share_budget(matrices, BUDGET, RECIPE)
    out = convert(sources[family], tmp_path / "out", CONVERSION, progress=False).out  # validates the table
    ranks = ranks_of(out)
    assert ranks.keys() == planned.keys()
    assert ranks != planned
    assert stored_bits(matrices, ranks, RECIPE) <= BUDGET
    spare = BUDGET - stored_bits(matrices, planned, RECIPE)
    for layer, own in layers_of(ranks).items():
        theirs = [matrix for matrix in matrices if f".{layer}." in matrix.name]
        assert stored_bits(theirs, own, RECIPE) <= stored_bits(theirs, planned, RECIPE) + spare + 1e-9
    assert all(ranks[matrix.name] <= largest_rank(matrix) for matrix in matrices)
    report = json.loads((out / "milo_report.json").read_text())
    assert {name: entry["rank"] for name, entry in report["matrices"].items()} == ranks
    assert len(report["needs"]) == 2
    for role, theirs in group_roles(matrices).items():
        (said,) = (roles[role] for roles in report["needs"].values() if role in roles)
        assert said["damage"] > 0
        assert {ranks[matrix.name] for matrix in theirs} == {said["rank"]}
    table = read_format(out)[0].ranks
    assert {name: rank for name, rank in ranks.items() if ".experts." not in name and rank} == table.modules


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_measured_ranks_of_each_layer_keep_the_target(family: str, sources: dict[str, Path], tmp_path: Path):
    matrices, settings = matrices_of(sources[family]), ModelReader(sources[family]).config
    free = serving_load(held_by(matrices, share_budget(matrices, BUDGET, RECIPE)[0], RECIPE), 2).serving_share
    share = 0.6 * free
    bounded = replace(CONVERSION, serving_share=share)
    out = convert(sources[family], tmp_path / "out", bounded, progress=False).out
    ranks = ranks_of(out)
    top_k = settings["num_experts_per_tok"]
    for layer, own in layers_of(ranks).items():
        theirs = [matrix for matrix in matrices if f".{layer}." in matrix.name]
        assert serving_load(held_by(theirs, own, RECIPE), top_k).serving_share <= share
    assert any(ranks.values())
    assert stored_bits(matrices, ranks, RECIPE) <= BUDGET
    assert read_format(out)[0].recipe["serving_share"] == share


def test_without_measuring_ranks_go_by_kind(sources: dict[str, Path], tmp_path: Path):
    planned, _ = share_budget(matrices_of(sources["qwen2_moe"]), BUDGET, RECIPE)
    by_kind = replace(CONVERSION, measure_ranks=False)
    out = convert(sources["qwen2_moe"], tmp_path / "kind", by_kind, progress=False).out
    assert ranks_of(out) == planned
    assert "needs" not in json.loads((out / "milo_report.json").read_text())
    plain = replace(CONVERSION, text=None)
    assert ranks_of(convert(sources["qwen2_moe"], tmp_path / "plain", plain, progress=False).out) == planned


def test_the_same_seed_gives_the_same_bytes(sources: dict[str, Path], tmp_path: Path):
    contents = []
    for number in range(2):
        torch.manual_seed(number)  # the state of torch's own generator does not count
        out = convert(sources["qwen3_moe"], tmp_path / str(number), CONVERSION, progress=False).out
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_the_other_ranks_stay_as_they_were(family: str, full: bool, sources: dict[str, Path]):
    folder = sources[family]
    reader = ModelReader(folder)
    tensors = reader_tensors(reader.load_finite, reader.tensors)
    model = StreamedModel(folder, reader.family, tensors, torch.device("cpu"), torch.float32)
    stream = SequentialPass(model, reader.family, WINDOWS, batch=2, full=full)
    visit = stream.visit(0)
    before = {name: values.clone() for name, values in visit.module.state_dict().items()}
    matrices = [matrix for matrix in matrices_of(folder) if ".layers.0." in matrix.name]
    meter, planned = NeedMeter(RECIPE, reader.dtype, batch=2), {matrix.name: 16 for matrix in matrices}
    ranks, needs = meter.share(stream, visit, matrices, planned)
    assert ranks.keys() == planned.keys()
    for role, said in needs.items():
        left = [1.0, *said["left"].values()]
        assert all(0 < after < ahead for ahead, after in pairwise(left)), role
    assert all(torch.equal(values, before[name]) for name, values in visit.module.state_dict().items())
    # with nothing to share there is nothing to measure
    assert meter.share(stream, visit, matrices, dict.fromkeys(planned, 0)) == (dict.fromkeys(planned, 0), {})
    assert meter.share(stream, visit, matrices[:1], planned) == ({matrices[0].name: 16}, {})
