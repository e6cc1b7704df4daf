"""Tiles by shape and tokens: the heuristic, and tuned files before it."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_milo.kernels import tuned
from vllm_milo.kernels.serving.dispatch import moe_configs
from vllm_milo.kernels.serving.gemm import heuristic
from vllm_milo.kernels.serving.gemm.config import GemmConfig
from vllm_milo.kernels.serving.gemm.heuristic import heuristic_configs
from vllm_milo.kernels.weights import MoEShape

SHAPES = [(8, 4096, 14336), (64, 2048, 1408), (128, 2048, 768), (1, 64, 64), (512, 7168, 2048)]
CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def layer(experts: int, hidden: int, intermediate: int, *groups: int, ranks: tuple[int, int] = (32, 16)) -> MoEShape:
    return MoEShape(experts, 2, hidden, intermediate, groups or (64, 64), ranks)


@pytest.mark.parametrize("groups", [(32, 32), (64, 64), (128, 128), (64, 128), (128, 64), (128, 32)])
@pytest.mark.parametrize("sizes", SHAPES)
def test_heuristic_holds_what_the_kernels_want(sizes, groups):
    for pairs in (1, 2, 7, 64, 500, 4096, 200_000):
        first, second = heuristic_configs(pairs, layer(*sizes, *groups), CPU)
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
        tiles = {heuristic_configs(pairs, layer(*sizes, *groups), CPU) for groups in product((64, 128), repeat=2)}
        assert len(tiles) == 1


def test_more_tokens_take_larger_tiles():
    tiles = [heuristic_configs(pairs, layer(8, 4096, 14336), CPU)[0].block_m for pairs in (2, 128, 512, 8192)]
    assert tiles == sorted(tiles)
    assert tiles[0] == 8
    assert tiles[-1] == 128


@pytest.mark.parametrize(("pairs_an_expert", "block_m", "tail"), [(64, 64, 16), (120, 128, 32), (1080, 128, 64)])
def test_last_pairs_take_the_cheaper_of_two_smaller_tiles(pairs_an_expert: int, block_m: int, tail: int):
    for config in heuristic_configs(64 * pairs_an_expert, layer(64, 2048, 1408), CPU):
        assert (config.block_m, config.tail_m) == (block_m, tail)


@pytest.mark.parametrize("pairs_an_expert", [1, 4, 6, 20, 32, 64, 96, 500])
@pytest.mark.parametrize("fast", [True, False])
def test_few_tokens_scale_weights_only_where_that_is_fast(pairs_an_expert: int, fast: bool):
    for tile in heuristic_configs(8 * pairs_an_expert, layer(8, 4096, 14336), CPU, fast):
        assert tile.fault() is None
        assert tile.scaled == (tile.block_m > (8 if fast else 32))
        assert tile.by_products.scaled == (tile.block_m > 32)
        assert tile.by_products.max_registers is None or tile.by_products == tile


@pytest.mark.parametrize(("memory", "block_m", "stages"), [(227, 128, 3), (163, 128, 2), (99, 128, 2), (64, 64, 2)])
def test_tiles_fit_the_shared_memory_of_the_device(memory: int, block_m: int, stages: int, monkeypatch):
    monkeypatch.setattr(heuristic, "shared_memory", lambda device: memory * 1024)
    config = heuristic_configs(8 * 1000, layer(8, 4096, 14336), CPU)[0]
    assert (config.block_m, config.num_stages) == (block_m, stages)
    for tile in heuristic_configs(8 * 50, layer(8, 4096, 14336), CPU):
        assert tile.max_registers == (168 if memory == 227 else None)


def test_three_tiles_of_16_tokens_fit_on_a_multiprocessor():
    tile = GemmConfig(16, 128, 1, False, 4, 4)
    assert tile.register_cap == 168
    assert tile._replace(max_registers=128).register_cap == 128
    assert all(other.register_cap is None for other in (tile._replace(block_m=32), tile._replace(num_warps=8)))


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 100, 700, 4096])
def test_dense_layers_fill_the_device_once(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heuristic, "processors", lambda device: 132)
    dense = SimpleNamespace(columns=6144, units=32)
    config = heuristic.linear_config(rows, dense, 64, CPU)
    tiles = -(-6144 // config.block_n) * -(-rows // config.block_m) * config.split_k
    assert rows > 64 or config.block_m >= rows
    assert config.split_k == 1 or tiles <= 3 * 132
    assert tiles > 48


# what the search found on an H100 (multiprocessors 132) with rank 16: parts of K of both GEMMs
FOUND = {
    (64, 6, 2048, 1408): {1: (2, 4), 8: (1, 1), 16: (1, 1), 64: (1, 1)},
    (128, 8, 2048, 768): {2: (1, 1), 4: (1, 1), 8: (1, 1), 32: (1, 1), 128: (1, 1)},
    (8, 2, 4096, 14336): {8: (1, 8), 16: (1, 4), 512: (1, 4), 1024: (1, 2), 4096: (1, 1)},
}


@pytest.mark.parametrize(("sizes", "found"), FOUND.items(), ids=str)
def test_k_is_split_about_as_the_search_found(sizes, found, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heuristic, "processors", lambda device: 132)
    experts, top_k, hidden, intermediate = sizes
    for tokens, parts in found.items():
        shape = MoEShape(experts, top_k, hidden, intermediate, (64, 64), (32, 16))
        chosen = [tile.split_k for tile in heuristic_configs(tokens * top_k, shape, CPU)]
        assert all(one <= 2 * best and best <= 2 * one for one, best in zip(chosen, parts, strict=True)), tokens


def test_k_is_split_about_as_in_the_files_that_are_shipped(monkeypatch: pytest.MonkeyPatch):
    """Where tiles stream weights: they are of an H200, with its bandwidth."""
    monkeypatch.setattr(heuristic, "processors", lambda device: 132)
    monkeypatch.setattr(heuristic, "bandwidth", lambda device: 4.8e12)
    content = json.loads((RESULTS / "tuning-h200.json").read_text())
    checked = 0
    for row in content["rows"]:
        tiles = re.findall(r"(\d+)x\d+(?: in (\d) parts)?", row["tiles"])
        if row["tokens"] > 64 or any(int(block_m) > heuristic.SHORT for block_m, _ in tiles):
            continue
        of = content["shapes"][row["model"]]
        sizes = [of[name] for name in ("experts", "top_k", "hidden", "intermediate")]
        shape = MoEShape(*sizes, tuple(of["groups"]), tuple(of["ranks"]))
        chosen = [tile.split_k for tile in heuristic_configs(row["tokens"] * shape.top_k, shape, CPU)]
        best = [int(parts or 1) for _, parts in tiles]
        assert all(one <= 2 * other and other <= 2 * one for one, other in zip(chosen, best, strict=True)), row
        checked += 1
    assert checked == 35


def test_many_short_tiles_take_the_time_of_their_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heuristic, "processors", lambda device: 132)
    (gemm, _), load = heuristic.gemm_shapes(layer(128, 2048, 768)), heuristic.expected_load(512, 128, 16)
    times = []
    for speed in (1e12, 2e12):
        monkeypatch.setattr(heuristic, "bandwidth", lambda device, speed=speed: speed)
        times.append(heuristic.streaming_time(gemm, load, 1, CPU))
    weights = 128 * 2 * 768 * 2048 * 3.5 / 8 * load.experts / 128
    assert times[0] > weights / 0.9e12 * 1e6
    assert times[0] == pytest.approx(2 * times[1], rel=0.1)


def test_without_compensators_k_is_split_as_much_or_more(monkeypatch: pytest.MonkeyPatch):
    """No tile adds up parts of V·x then."""
    monkeypatch.setattr(heuristic, "processors", lambda device: 132)
    with_ranks, without = (
        [
            tile.split_k
            for pairs in (8, 16, 32)
            for tile in heuristic_configs(pairs, layer(128, 2048, 768, ranks=r), CPU)
        ]
        for r in ((32, 16), (0, 0))
    )
    assert all(more >= less for more, less in zip(without, with_ranks, strict=True))
    assert without != with_ranks


def test_tuned_tiles_come_before_the_heuristic(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "device_name", lambda device: "Some GPU")
    tuned.forget()
    shape, device = layer(8, 128, 256), torch.device("cuda")
    first, second = heuristic_configs(2, shape, CPU)
    entries = {16: (first, second._replace(split_k=7)), 128: (first, second._replace(split_k=5))}
    tuned.write_file(tmp_path / tuned.make_key(shape, "Some GPU", torch.bfloat16).file_name, entries, "3.6.0")
    assert moe_configs(20, shape, 1.0, device, torch.bfloat16, True) == entries[16]
    assert moe_configs(128, shape, 1.0, device, torch.bfloat16, True) == entries[128]
    # of 128 tokens' pairs an eighth of the experts sees an eighth
    assert moe_configs(128, shape, 1 / 8, device, torch.bfloat16, True) == entries[16]
    tuned.forget()


def test_the_heuristic_counts_the_pairs_of_local_experts():
    shape = layer(16, 2048, 768)
    assert moe_configs(4096, shape, 1.0, CPU, torch.bfloat16, True) == heuristic_configs(8192, shape, CPU)
    assert moe_configs(4096, shape, 1 / 8, CPU, torch.bfloat16, True) == heuristic_configs(1024, shape, CPU)
    few = [moe_configs(128, shape, 1.0, CPU, dtype, False) for dtype in (torch.bfloat16, torch.float16)]
    assert few == [heuristic_configs(256, shape, CPU, fast=False)] * 2
