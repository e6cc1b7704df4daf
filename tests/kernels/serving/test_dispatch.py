"""Tiles by shape and tokens: the heuristic, tuned files, and what a broken file says."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from vllm_milo.kernels import tuned
from vllm_milo.kernels.serving import dispatch
from vllm_milo.kernels.serving.dispatch import MoEShape, heuristic_configs, moe_configs

SHAPES = [(8, 4096, 14336), (64, 2048, 1408), (128, 2048, 768), (1, 64, 64), (512, 7168, 2048)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("groups", [(32, 32), (64, 64), (128, 128), (64, 128), (128, 64), (128, 32)])
@pytest.mark.parametrize("sizes", SHAPES)
def test_heuristic_holds_what_the_kernels_want(sizes, groups):
    for pairs in (1, 2, 7, 64, 500, 4096, 200_000):
        first, second = heuristic_configs(pairs, MoEShape(*sizes, *groups), CPU)
        assert first.block_m == second.block_m
        assert not (first.scaled and first.split_k > 1)
        for config, group in zip((first, second), groups, strict=True):
            assert config.block_n % 64 == 0
            assert config.tail_m < config.block_m
            assert not (group == 32 and config.scaled)


@pytest.mark.parametrize("sizes", SHAPES)
def test_groups_of_64_beside_128_run_in_the_same_tiles(sizes):
    """A mixture, which comes of sizes that 128 does not divide, must not fall off the path that is tuned."""
    for pairs in (1, 7, 64, 500, 4096, 200_000):
        tiles = {heuristic_configs(pairs, MoEShape(*sizes, *groups), CPU) for groups in product((64, 128), repeat=2)}
        assert len(tiles) == 1


def test_more_tokens_take_larger_tiles():
    tiles = [
        heuristic_configs(pairs, MoEShape(8, 4096, 14336, 64, 64), CPU)[0].block_m for pairs in (2, 128, 512, 8192)
    ]
    assert tiles == sorted(tiles)
    assert tiles[0] == 16
    assert tiles[-1] == 128


@pytest.mark.parametrize(("pairs_an_expert", "block_m", "tail"), [(64, 64, 16), (96, 128, 32), (1080, 128, 64)])
def test_last_pairs_take_the_cheaper_of_two_smaller_tiles(pairs_an_expert: int, block_m: int, tail: int):
    for config in heuristic_configs(64 * pairs_an_expert, MoEShape(64, 2048, 1408, 64, 64), CPU):
        assert (config.block_m, config.tail_m) == (block_m, tail)


@pytest.mark.parametrize(("memory", "block_m", "stages"), [(227, 128, 3), (163, 128, 2), (99, 128, 2), (64, 64, 2)])
def test_tiles_fit_the_shared_memory_of_the_device(memory: int, block_m: int, stages: int, monkeypatch):
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: memory * 1024)
    config = heuristic_configs(8 * 1000, MoEShape(8, 4096, 14336, 64, 64), CPU)[0]
    assert (config.block_m, config.num_stages) == (block_m, stages)
    first, second = heuristic_configs(8 * 50, MoEShape(8, 4096, 14336, 64, 64), CPU)
    assert first.max_registers == (168 if memory == 227 else None)
    assert second.max_registers is None


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 100, 700, 4096])
def test_dense_layers_fill_the_device_once(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "processors", lambda device: 132)
    layer = SimpleNamespace(columns=6144, units=32)
    config = dispatch.linear_config(rows, layer, 64, CPU)
    tiles = -(-6144 // config.block_n) * -(-rows // config.block_m) * config.split_k
    assert rows > 64 or config.block_m >= rows
    assert config.split_k == 1 or tiles <= 3 * 132
    assert tiles > 48


def test_a_tuned_file_is_used_and_a_broken_one_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "_device_name", lambda device: "Some GPU")
    tuned.load.cache_clear()
    shape, device = MoEShape(8, 128, 256, 64, 64), torch.device("cuda")
    path = tmp_path / tuned.file_name(8, 256, "Some GPU")
    pair = heuristic_configs(2, shape, CPU)
    entry = {key: config._asdict() for key, config in zip(dispatch.TUNED_KEYS, pair, strict=True)}
    entry["down"]["split_k"] = 7
    tuned.write_file(path, {16: entry}, "3.6.0")
    found = moe_configs(20, 2, shape, device)
    assert found == (pair[0], pair[1]._replace(split_k=7))
    tuned.load.cache_clear()
    path.write_text(json.dumps({"16": {"gate_up": entry["gate_up"]}}))
    with pytest.raises(ValueError, match=r"E=8,N=256.*20 tokens.*'down'"):
        moe_configs(20, 2, shape, device)
    tuned.load.cache_clear()
