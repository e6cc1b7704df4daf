"""Files of tuned tiles: their names, folders, the nearest classes of ranks and token counts, broken files."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import pytest
import torch
from meta_layers import make_experts

from vllm_milo.kernels import ops, tuned
from vllm_milo.kernels.serving.gemm.config import GemmConfig
from vllm_milo.kernels.weights import MoEShape

H200 = "NVIDIA H200"
SHAPE = MoEShape(8, 2, 4096, 14336, (128, 128), (32, 0))
NAME = "E=8,N=14336,K=4096,top_k=2,groups=128+128,ranks=64+0,device_name=NVIDIA_H200,dtype=int3_milo_bfloat16.json"
SMALL, LARGE = GemmConfig(16, 128, 1, False, 4, 3), GemmConfig(64, 128, 1, True, 4, 3, 4, 16)
TILES = {1: (SMALL, SMALL._replace(split_k=4)), 16: (SMALL, SMALL), 64: (LARGE, LARGE._replace(split_k=2))}


def key(shape: MoEShape = SHAPE, device: str = H200, dtype: torch.dtype = torch.bfloat16) -> tuned.Key:
    return tuned.make_key(shape, device, dtype)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuned, "OWN_FOLDER", tmp_path / "own")
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path / "user"))
    (tmp_path / "user").mkdir()
    tuned.forget()
    yield
    tuned.forget()


def write(folder: Path, shape: MoEShape = SHAPE, tokens: int = 1, tile: GemmConfig = SMALL, device: str = H200) -> Path:
    """Write a file of one entry, which tells files apart by its number of tokens."""
    path = folder / key(shape, device).file_name
    tuned.write_file(path, {tokens: (tile, tile)}, "3.6.0")
    return path


def test_a_name_says_all_and_is_read_back():
    assert key().file_name == NAME
    assert tuned.parse_name(Path(NAME)) == key()
    assert key(device="NVIDIA H200 NVL") == key()
    odd = key(SHAPE._replace(ranks=(4096, 256)), "a/b, c", torch.float16)
    assert odd.file_name.endswith("ranks=over256+256,device_name=a_b__c,dtype=int3_milo_float16.json")
    assert tuned.parse_name(Path(odd.file_name)) == odd


@pytest.mark.parametrize(
    ("rank", "name"), [(0, "0"), (16, "64"), (64, "64"), (80, "256"), (256, "256"), (272, "over256"), (9999, "over256")]
)
def test_classes_of_ranks(rank: int, name: str):
    assert tuned.CLASSES[tuned.rank_class(rank)] == name


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "own" / NAME
    tuned.write_file(path, {64: TILES[64], 1: TILES[1], 16: TILES[16]}, "3.6.0")
    assert list(json.loads(path.read_text())["tokens"]) == ["1", "16", "64"]
    assert tuned.load(key()) == TILES
    assert [path.name for path in path.parent.iterdir()] == [NAME]


@pytest.mark.parametrize(
    "other",
    [
        SHAPE._replace(experts=4),
        SHAPE._replace(top_k=1),
        SHAPE._replace(hidden=2048),
        SHAPE._replace(intermediate=7168),  # of two processes with tensor parallelism
        SHAPE._replace(groups=(128, 64)),
    ],
)
def test_other_shapes_and_shards_have_files_of_their_own(other: MoEShape, tmp_path: Path):
    write(tmp_path / "own", other, tokens=7)
    assert tuned.load(key()) is None
    assert list(tuned.load(key(other)) or ()) == [7]


def test_other_devices_and_dtypes_have_files_of_their_own(tmp_path: Path):
    write(tmp_path / "own", device="NVIDIA H100 80GB HBM3")
    assert tuned.load(key()) is None
    write(tmp_path / "own")
    tuned.forget()
    assert tuned.load(key(dtype=torch.float16)) is None
    assert tuned.load(key()) is not None


def test_the_nearest_classes_of_ranks_count_before_the_heuristic(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for tokens, ranks in ((1, (0, 0)), (2, (64, 64)), (3, (1024, 1024))):
        write(tmp_path / "own", SHAPE._replace(ranks=ranks), tokens)
    found = {
        ranks: list(tuned.load(key(SHAPE._replace(ranks=ranks))) or ())
        for ranks in ((0, 0), (16, 16), (128, 16), (1024, 512), (256, 1024))
    }
    assert found == {(0, 0): [1], (16, 16): [2], (128, 16): [2], (1024, 512): [3], (256, 1024): [3]}
    with caplog.at_level(logging.INFO, logger="vllm.milo"):
        tuned.load.cache_clear()
        tuned.load(key(SHAPE._replace(ranks=(128, 16))))
        tuned.load(key(SHAPE._replace(ranks=(16, 16))))
    assert ["nearest classes" in record.getMessage() for record in caplog.records] == [True, False]


def test_a_users_file_comes_first_unless_its_ranks_are_further(tmp_path: Path):
    write(tmp_path / "own", tokens=1)
    write(tmp_path / "user", SHAPE._replace(ranks=(0, 0)), tokens=2)
    assert list(tuned.load(key()) or ()) == [1]
    write(tmp_path / "user", tokens=3)
    tuned.forget()
    assert list(tuned.load(key()) or ()) == [3]


@pytest.mark.parametrize(
    ("tokens", "count"), [(1, 1), (8, 1), (9, 16), (40, 16), (41, 64), (4096, 64)], ids=lambda value: str(value)
)
def test_the_nearest_token_count_is_taken(tokens: int, count: int):
    assert tuned.nearest(TILES, tokens) == TILES[count]


def test_a_missing_file_is_logged_once_with_what_makes_it(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="vllm.milo"):
        for _ in range(3):
            assert tuned.load(key()) is None
    (record,) = caplog.records
    assert NAME in record.getMessage()
    assert "milo tune" in record.getMessage()


def test_a_folder_that_is_none_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    write(tmp_path / "own")
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path / "nowhere"))
    assert tuned.load(key()) is not None
    assert "nowhere is no folder" in caplog.text


def test_vllms_own_files_in_the_folder_are_left_alone(tmp_path: Path):
    (tmp_path / "user" / "E=8,N=14336,device_name=NVIDIA_H200,dtype=fp8_w8a8.json").write_text("{}")
    assert tuned.load(key()) is None


@pytest.mark.parametrize(
    "name",
    [
        "E=8,N=14336,device_name=NVIDIA_H200,dtype=int3_milo.json",  # of the version before
        NAME.replace("128+128", "128"),
        NAME.replace("64+0", "16+0"),
        NAME.replace("bfloat16", "float64"),
    ],
)
def test_a_name_of_another_version_is_an_error_whatever_the_shape(name: str, tmp_path: Path):
    (tmp_path / "user" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"user/E=8.*this version of vllm-milo; tune again"):
        tuned.load(key(SHAPE._replace(experts=64)))


def content(tokens: str = "1", **changes: object) -> str:
    tile = SMALL._asdict()
    entry = {"gate_up": tile, "down": tile | changes}
    return json.dumps({"format": 2, "triton_version": "3.6.0", "tokens": {tokens: entry}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "format 'no object'"),
        ("{}", "format 'none', this version reads 2"),
        ('{"1": {}}', "format 'none'"),
        (content().replace('"format": 2', '"format": 3'), "format 3, this version reads 2"),
        ('{"format": 2}', "has no tiles"),
        ('{"format": 2, "tokens": {"1": {"gate_up": {}}}}', "1 tokens: .*missing"),
        (content().replace("down", "up"), "1 tokens: no 'down'"),
        (content("many"), "many tokens: not a number"),
        (content("0"), "0 tokens: not a number"),
        (content(speed=3), "1 tokens: .*unexpected keyword argument 'speed'"),
        (content(block_m=32), "block_m is 16 and 32"),
        (content(block_n=96), "down: block_n is 96, and must be one of 64, 128, 256"),
        (content(split_k=0), "down: split_k is 0"),
        (content(num_warps="4"), "down: num_warps must be a number, found '4'"),
        (content(tail_m=16), "down: tail_m is 16, and must be less than block_m"),
        (content(scaled=1), "down: scaled must be true or false"),
        (content(joined=1), "down: joined must be true or false"),
        (content(joined=True), "down: joined needs scaled weights and a tail_m of at least 16, found 0"),
        (content(max_registers=9), "down: max_registers must be null or from 24 to 255"),
    ],
)
def test_broken_files_are_refused_by_name(text: str, reason: str, tmp_path: Path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / NAME).write_text(text)
    with pytest.raises(ValueError, match=rf"own/E=8,N=14336.*{reason}.*tune again"):
        tuned.load(key())


def test_tiles_that_need_whole_sums_and_split_them_are_refused(tmp_path: Path):
    path = write(tmp_path / "own", tile=LARGE)
    path.write_text(path.read_text().replace('"split_k": 1', '"split_k": 2', 1))
    with pytest.raises(ValueError, match="gate_up scales weights, and then needs whole sums"):
        tuned.load(key())


def test_find_uses_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuned.write_file(tmp_path / "own" / NAME, TILES, "3.6.0")
    monkeypatch.setattr(tuned, "device_name", lambda device: H200)
    assert tuned.find(SHAPE, 20, torch.device("cuda"), torch.bfloat16) == TILES[16]
    assert tuned.find(SHAPE, 20, torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_layers_tiles_are_looked_up_when_it_is_loaded(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that a file which is broken stops a server at its start."""
    spec, w13, w2 = make_experts(8, 4096, 14336, ranks=(32, 0), groups=(128, 128))
    looked: list[MoEShape] = []

    def find(shape: MoEShape, tokens: int, device: torch.device, dtype: torch.dtype) -> tuned.Tiles | None:
        looked.append(shape)
        return (tuned.load(key(shape)) or {}).get(tokens)

    monkeypatch.setattr(tuned, "find", find)
    ops.find_tiles(w13, w2, spec, 2, torch.bfloat16, backend)
    assert looked == ([SHAPE] if backend == "triton" else [])
    write(tmp_path / "user").write_text("{}")
    tuned.forget()
    with pytest.raises(ValueError, match="this version reads 2") if backend == "triton" else contextlib.nullcontext():
        ops.find_tiles(w13, w2, spec, 2, torch.bfloat16, backend)


def test_files_of_the_package_hold_tiles_at_every_token_count():
    for path in sorted((Path(tuned.__file__).parent / "tuned").glob("*.json")):
        tuned.parse_name(path)
        assert list(tuned.read_file(path)) == [2**exponent for exponent in range(13)]
