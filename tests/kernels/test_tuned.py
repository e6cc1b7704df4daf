"""Tuned configuration files: naming, folders, the nearest token count, broken files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from vllm_milo.kernels import tuned
from vllm_milo.kernels.serving.dispatch import TUNED_KEYS
from vllm_milo.kernels.serving.gemm.config import GemmConfig

H100 = "NVIDIA H100 80GB HBM3"
NAME = "E=8,N=14336,device_name=NVIDIA_H100_80GB_HBM3,dtype=int3_milo.json"
CONFIGS = {1: {"block_m": 16}, 16: {"block_m": 32}, 64: {"block_m": 64}}


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuned, "OWN_FOLDER", tmp_path / "own")
    monkeypatch.delenv(tuned.FOLDER_VARIABLE, raising=False)
    tuned.load.cache_clear()
    yield
    tuned.load.cache_clear()


def test_file_names_are_vllms():
    assert tuned.file_name(8, 14336, H100) == NAME
    assert tuned.file_name(128, 768, "NVIDIA H200 NVL").startswith("E=128,N=768,device_name=NVIDIA_H200,")
    assert "/" not in tuned.file_name(1, 64, "a/b c")


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "own" / NAME
    tuned.write_file(path, {64: CONFIGS[64], 1: CONFIGS[1], 16: CONFIGS[16]}, "3.6.0")
    assert list(json.loads(path.read_text())) == ["triton_version", "1", "16", "64"]
    assert tuned.load(8, 14336, H100) == CONFIGS
    assert tuned.load(8, 7168, H100) is None


@pytest.mark.parametrize(
    ("tokens", "block_m"), [(1, 16), (8, 16), (9, 32), (40, 32), (41, 64), (4096, 64)], ids=lambda value: str(value)
)
def test_the_nearest_token_count_is_taken(tokens: int, block_m: int):
    assert tuned.nearest(CONFIGS, tokens) == {"block_m": block_m}


def test_the_users_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuned.write_file(tmp_path / "own" / NAME, {1: {"block_m": 16}}, "3.6.0")
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path / "user"))
    assert tuned.load(8, 14336, H100) == {1: {"block_m": 16}}
    tuned.load.cache_clear()
    tuned.write_file(tmp_path / "user" / NAME, {1: {"block_m": 32}}, "3.6.0")
    assert tuned.load(8, 14336, H100) == {1: {"block_m": 32}}


def test_a_missing_file_is_logged_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="vllm.milo"):
        for _ in range(3):
            assert tuned.load(8, 14336, H100) is None
    assert [NAME in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"triton_version": "3.6.0"}', '{"many": {}}', '{"1": 16}'])
def test_broken_files_are_refused_by_name(content: str, tmp_path: Path):
    path = tmp_path / NAME
    path.write_text(content)
    with pytest.raises(ValueError, match=r"E=8,N=14336.*tune again"):
        tuned.read_file(path)


def test_find_uses_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuned.write_file(tmp_path / "own" / NAME, CONFIGS, "3.6.0")
    monkeypatch.setattr(tuned, "_device_name", lambda device: H100)
    assert tuned.find(8, 14336, 20, torch.device("cuda")) == {"block_m": 32}
    assert tuned.find(8, 1024, 20, torch.device("cuda")) is None
    assert tuned.find(8, 14336, 20, torch.device("cpu")) is None


def test_files_of_the_package_hold_tiles_for_both_gemms_at_every_token_count():
    files = sorted((Path(tuned.__file__).parent / "tuned").glob("*.json"))
    assert len(files) >= 3
    for path in files:
        configs = tuned.read_file(path)
        assert list(configs) == [2**exponent for exponent in range(13)]
        for entry in configs.values():
            first, second = (GemmConfig(**entry[gemm]) for gemm in TUNED_KEYS)
            assert first.block_m == second.block_m
            assert first.split_k == 1 or not first.scaled
            assert first.num_warps == second.num_warps == 4
