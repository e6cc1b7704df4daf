"""Files of tiles that were tuned for experts of a shape on a device, and which file counts for a layer.

A file's name says all that it is for::

    E=8,N=14336,K=4096,top_k=2,groups=128+128,ranks=64+0,device_name=NVIDIA_H200,dtype=int3_milo_bfloat16.json

``E`` local experts, ``N`` this process's share of an expert's intermediate size and ``K`` the hidden size, both padded
to multiples of 64; experts of a token; group sizes and rank classes (:func:`rank_class`) of both GEMMs, gate/up first;
the device as PyTorch names it, and the dtype of activations. It holds ``format``, the version of Triton, and the tiles
of both GEMMs by number of tokens.

Files are looked for in the folder that ``VLLM_TUNED_CONFIG_FOLDER`` names, where vLLM has its own too, and in
``tuned/`` beside this module. Where no file has a layer's rank classes, the nearest classes of the same shape count.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .serving.gemm.config import GemmConfig
from .serving.projection.plan import rank_tiles
from .weights import MoEShape

logger = logging.getLogger("vllm.milo")

FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
"""vLLM's own, for its files of tiles."""
OWN_FOLDER = Path(__file__).parent / "tuned"
FORMAT = 2
GEMMS = ("gate_up", "down")
"""The tiles of the two GEMMs of a layer stand under these keys."""
CLASS_TILES = (0, 1, 4)
"""Most tiles of 64 ranks that V·x takes in each class of ranks but the last."""
CLASSES = ("0", "64", "256", "over256")
"""Names of the classes: most ranks of an expert, its parts padded and added."""

Tiles = tuple[GemmConfig, GemmConfig]
"""The tiles of a layer's two GEMMs, gate/up first. They agree in block_m."""

_MARK = "dtype=int3_milo"
_NAME = re.compile(
    r"E=(?P<experts>[0-9]{1,6}),N=(?P<intermediate>[0-9]{1,7}),K=(?P<hidden>[0-9]{1,7}),top_k=(?P<top_k>[0-9]{1,4}),"
    rf"groups=(?P<groups>(?:32|64|128)\+(?:32|64|128)),ranks=(?P<first>{'|'.join(CLASSES)})\+(?P<second>"
    rf"{'|'.join(CLASSES)}),device_name=(?P<device>[^,]+),{_MARK}_(?P<dtype>bfloat16|float16)\.json"
)
_AGAIN = "tune again with `milo tune`, or remove it"


class Key(NamedTuple):
    """What tiles are tuned for: a file's name in numbers. ``ranks`` are places in :data:`CLASSES`."""

    experts: int
    intermediate: int
    hidden: int
    top_k: int
    groups: tuple[int, int]
    ranks: tuple[int, int]
    device: str
    dtype: str

    @property
    def file_name(self) -> str:
        """Return the name of the file."""
        first, second = (CLASSES[place] for place in self.ranks)
        return (
            f"E={self.experts},N={self.intermediate},K={self.hidden},top_k={self.top_k},"
            f"groups={self.groups[0]}+{self.groups[1]},ranks={first}+{second},"
            f"device_name={self.device},{_MARK}_{self.dtype}.json"
        )

    def distance(self, other: Key) -> int | None:
        """Return how many classes of ranks lie between two keys; None where they differ in anything else."""
        if self._replace(ranks=other.ranks) != other:
            return None
        return sum(abs(own - its) for own, its in zip(self.ranks, other.ranks, strict=True))


def rank_class(max_rank: int) -> int:
    """Return the class of ranks as a place in :data:`CLASSES`.

    Kernels differ by whether there are compensators, and V·x takes its ranks in tiles of 64: the classes are none, one
    tile, up to four, and more.

    Args:
        max_rank: as :func:`.weights.largest_rank` counts.
    """
    tiles = rank_tiles(max_rank)
    return sum(tiles > most for most in CLASS_TILES)


def make_key(shape: MoEShape, device_name: str, dtype: torch.dtype) -> Key:
    """Return the key of a layer; all H200s share one name, as in vLLM."""
    device = re.sub(r"[ /,]", "_", device_name)
    if "H200" in device.split("_"):
        device = "NVIDIA_H200"
    first, second = map(rank_class, shape.ranks)
    sizes = (shape.experts, shape.intermediate, shape.hidden, shape.top_k)
    return Key(*sizes, shape.groups, (first, second), device, str(dtype).removeprefix("torch."))


def parse_name(path: Path) -> Key:
    """Return the key that a file's name says.

    Raises:
        ValueError: the name is none of ours, or of an earlier version.
    """
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"{path}: not named as files of tiles are in this version of vllm-milo; {_AGAIN}")
    experts, intermediate, hidden, top_k = (int(found[name]) for name in ("experts", "intermediate", "hidden", "top_k"))
    first_group, second_group = map(int, found["groups"].split("+"))
    ranks = CLASSES.index(found["first"]), CLASSES.index(found["second"])
    groups = first_group, second_group
    return Key(experts, intermediate, hidden, top_k, groups, ranks, found["device"], found["dtype"])


def read_file(path: Path) -> dict[int, Tiles]:
    """Return the tiles of a file by number of tokens.

    Raises:
        ValueError: the file cannot be read, is of another format, or holds tiles that the kernels do not have.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); {_AGAIN}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format", "none") if isinstance(content, dict) else "no object"
        raise ValueError(f"{path}: holds tiles of format {found!r}, this version reads {FORMAT}; {_AGAIN}")
    entries = content.get("tokens")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: has no tiles by number of tokens; {_AGAIN}")
    tiles = {}
    for tokens, entry in entries.items():
        try:
            tiles[_count(tokens)] = read_tiles(entry)
        except (KeyError, TypeError, ValueError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: {tokens} tokens: {said}; {_AGAIN}") from None
    return tiles


def _count(tokens: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", tokens):
        raise ValueError("not a number of tokens")
    return int(tokens)


def read_tiles(entry: Any) -> Tiles:
    """Return the tiles of both GEMMs from JSON.

    Raises:
        KeyError, TypeError, ValueError: what is missing, unknown, or fits no kernel.
    """
    first, second = (GemmConfig(**entry[gemm]) for gemm in GEMMS)
    for gemm, tile in zip(GEMMS, (first, second), strict=True):
        if reason := tile.fault():
            raise ValueError(f"{gemm}: {reason}")
    if first.block_m != second.block_m:
        raise ValueError(f"block_m is {first.block_m} and {second.block_m}, and both GEMMs share the blocks of tokens")
    if first.scaled and first.split_k > 1:
        raise ValueError("gate_up scales weights, and then needs whole sums: split_k must be 1")
    return first, second


def write_file(path: Path, tiles: Mapping[int, Tiles], triton_version: str) -> None:
    """Write tiles by number of tokens; a file that is there is replaced at once."""
    entries = {
        str(tokens): {gemm: tile._asdict() for gemm, tile in zip(GEMMS, tiles[tokens], strict=True)}
        for tokens in sorted(tiles)
    }
    content = {"format": FORMAT, "triton_version": triton_version, "tokens": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


@cache
def load(key: Key) -> dict[int, Tiles] | None:
    """Return the tiles of a layer by number of tokens, or None where no file has its shape; the log says which, once.

    Raises:
        ValueError: the file is broken, or one of the user's has a name of an earlier version.
    """
    near = [
        (distance, place, path)
        for place, folder in enumerate(_folders())
        for other, path in _files(folder).items()
        if (distance := key.distance(other)) is not None
    ]
    if near:
        distance, _, path = min(near)
        nearest_only = " (the nearest classes of ranks)" if distance else ""
        logger.info("MiLo experts use the tuned tiles of %s%s", path, nearest_only)
        return read_file(path)
    logger.info(
        "MiLo experts use heuristic tiles: no %s; `milo tune CHECKPOINT -o FOLDER` makes it, %s names its folder",
        key.file_name,
        FOLDER_VARIABLE,
    )
    return None


def nearest(tiles: Mapping[int, Tiles], tokens: int) -> Tiles:
    """Return the tiles of the nearest token count, as vLLM does; of two as near, the first in the file."""
    return tiles[min(tiles, key=lambda count: abs(count - tokens))]


def find(shape: MoEShape, tokens: int, device: torch.device, dtype: torch.dtype) -> Tiles | None:
    """Return the tuned tiles for a layer and a number of tokens on a device; None where there are none.

    Experts without a gate have none: a file's name does not tell them from others.
    """
    tuned = device.type == "cuda" and shape.parts == 2
    tiles = load(make_key(shape, device_name(device), dtype)) if tuned else None
    return None if tiles is None else nearest(tiles, tokens)


def forget() -> None:
    """Forget what was read, so that files are looked for again."""
    load.cache_clear()
    _files.cache_clear()


@cache
def device_name(device: torch.device) -> str:
    """Return PyTorch's name of a GPU."""
    return torch.cuda.get_device_name(device)


def _folders() -> list[Path]:
    user = os.environ.get(FOLDER_VARIABLE)
    if user and not Path(user).is_dir():
        logger.warning("%s=%s is no folder: MiLo finds no tiles there", FOLDER_VARIABLE, user)
        user = None
    return [Path(user), OWN_FOLDER] if user else [OWN_FOLDER]


@cache
def _files(folder: Path) -> dict[Key, Path]:
    """Return our files of a folder, which may hold vLLM's too."""
    return {parse_name(path): path for path in sorted(folder.glob(f"E=*{_MARK}*.json"))}
