"""Which tiles are tried: near the load of an expert, on the device, those that may be good."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.kernels.serving.gemm import heuristic
from vllm_milo.kernels.tuning import candidates
from vllm_milo.kernels.tuning.candidates import all_candidates, first_candidates, second_candidates
from vllm_milo.kernels.weights import MoEShape

CPU = torch.device("cpu")
MIXTRAL = MoEShape(8, 2, 4096, 14336, (128, 128), (640, 320))
QWEN = MoEShape(128, 8, 2048, 768, (128, 128), (96, 48))


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch):
    for module in (heuristic, candidates):
        monkeypatch.setattr(module, "processors", lambda device: 132)


@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 4096])
@pytest.mark.parametrize("shape", [MIXTRAL, QWEN])
def test_the_heuristic_comes_first_and_all_fit_together(shape: MoEShape, tokens: int):
    firsts = first_candidates(tokens, shape, CPU)
    assert firsts[0] == heuristic.heuristic_configs(tokens * shape.top_k, shape, CPU)
    seconds = second_candidates(tokens, shape, firsts[-1], CPU)
    assert {first for first, _ in seconds} == {firsts[-1][0]}
    for tried in (firsts, seconds):
        assert len(set(tried)) == len(tried)
        assert 2 <= len(tried) <= candidates.MOST + 1
        assert all(first.block_m == second.block_m for first, second in tried)
        assert all(first.split_k == 1 for first, _ in tried if first.scaled)
        assert not any(tile.fault() for pair in tried for tile in pair)
    every = all_candidates(tokens, shape, CPU)
    assert set(firsts) <= set(every)
    assert {second for _, second in seconds} <= {second for _, second in every}


def test_tiles_are_about_as_large_as_an_experts_load():
    sizes = {tokens: {first.block_m for first, _ in first_candidates(tokens, MIXTRAL, CPU)} for tokens in (1, 64, 4096)}
    assert sizes[1] == {8, 16}
    assert {16, 32} <= sizes[64]
    assert min(sizes[4096]) >= 64
    assert max(sizes[4096]) == 128


def test_what_costs_far_more_is_not_tried():
    """With 128 experts at work K in many parts is a loss; with one token it may be a gain."""
    many = {second.split_k for _, second in all_candidates(128, QWEN, CPU)}
    few = {second.split_k for _, second in all_candidates(1, QWEN, CPU)}
    assert max(many) <= 2 <= max(few)
    assert {second.split_k for _, second in all_candidates(1, MIXTRAL, CPU)} >= {4, 8}


def test_tiles_fit_the_shared_memory_of_the_device(monkeypatch: pytest.MonkeyPatch):
    everything = {tile.block_m for pair in first_candidates(4096, MIXTRAL, CPU) for tile in pair}
    for module in (heuristic, candidates):
        monkeypatch.setattr(module, "shared_memory", lambda device: 99 * 1024)
    fewer = {tile for pair in first_candidates(4096, MIXTRAL, CPU)[1:] for tile in pair}
    assert {tile.block_m for tile in fewer} < everything
    assert all(candidates.fits(tile, CPU) for tile in fewer)


def test_last_pairs_are_tried_both_ways_where_they_may_be_joined():
    tiles = {first for first, _ in first_candidates(128, MIXTRAL, CPU)}
    found = {tile for tile in tiles if tile.joined}
    assert found
    assert all(tile.block_m == candidates.JOINING and tile.fault() is None for tile in found)
    assert any(tile._replace(joined=False) in tiles for tile in found)


def test_few_tokens_are_tried_by_products_and_by_weights():
    tiles = [first for first, _ in first_candidates(32, MIXTRAL, CPU)]
    assert {(tile.block_m, tile.scaled) for tile in tiles} == {(8, False), (16, True), (32, True)}


def test_groups_of_32_never_scale_weights():
    for tokens in (1, 256, 4096):
        pairs = all_candidates(tokens, QWEN._replace(groups=(128, 32)), CPU)
        assert not any(tile.scaled for pair in pairs for tile in pair)
