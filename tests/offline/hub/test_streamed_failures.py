"""`--delete-source-shards` where downloads fail, trickle or come damaged."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, HubServer
from hub_streams import NAME, PLAIN, content, failure, hidden, local, stream, weights
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save

from vllm_milo.offline.hub import files, patience


def withdraw(hub: HubServer, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.withdrawn_files = {shard}


def cut(hub: HubServer, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut_files = {shard}


def fill(hub: HubServer, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(repository: str, name: str, **options) -> str:
        if name == shard:
            raise OSError(errno.ENOSPC, "No space left on device")
        return hf_hub_download(repository, name, **options)

    monkeypatch.setattr(files, "hf_hub_download", full)


def exchange(hub: HubServer, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.says_hashes = False
    there = hub.repositories[NAME].commits[COMMIT]
    hub.before_weights = lambda _: there.__setitem__(shard, save({"other": torch.zeros(2)}))


def flip(hub: HubServer, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.flips = {shard: 99}  # what failed ahead of its use is tried again when it is used


def slow_down(hub: HubServer, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SECONDS", 2)
    hub.slow_files = {shard}


FAILURES: Mapping[str, tuple[Callable[[HubServer, str, pytest.MonkeyPatch], None], str]] = {
    "missing": (withdraw, "the Hugging Face Hub lists this file but does not have it (404)"),
    "interrupted": (cut, "cannot be reached: peer closed connection"),
    "full disk": (fill, "the disk is full ({source}); free space or choose another output"),
    "damaged": (flip, "came damaged twice: its SHA-256 is "),
    "exchanged": (exchange, "is not the file whose header was read before; try again later"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_downloads_that_fail(hub: HubServer, shards: list[str], what: str, tmp_path: Path, capsys, monkeypatch):
    """Say what is wrong in a line, keep what is finished, and leave no shard."""
    there = dict(hub.repositories[NAME].commits[COMMIT])
    break_, message = FAILURES[what]
    with monkeypatch.context() as patch:
        break_(hub, shards[4], patch)
        line = failure(capsys, tmp_path, *PLAIN)
    assert line.startswith(f"milo quantize: error: {NAME}: {shards[4]}: ")
    assert message.format(source=tmp_path / ".out.partial" / "source") in line
    assert "layers are kept in" in line
    assert line.endswith("go on with the same command and --resume")
    assert hidden(tmp_path) == [".out.partial"]
    assert not (tmp_path / ".out.partial" / "source").exists()
    hub.withdrawn_files, hub.cut_files, hub.flips, hub.before_weights = set(), set(), {}, lambda _: None
    hub.repositories[NAME].commits[COMMIT] = there
    assert stream(tmp_path, *PLAIN, "--resume") == 0


def test_a_hub_that_trickles(hub: HubServer, shards: list[str], tmp_path: Path, capsys, monkeypatch):
    """Is left after a while, and asked again with --resume; what is finished is not downloaded again."""
    whole = local(hub, tmp_path, *PLAIN)
    with monkeypatch.context() as patch:
        slow_down(hub, shards[3], patch)
        line = failure(capsys, tmp_path, *PLAIN)
    assert f"{NAME}: nothing came from the Hugging Face Hub ({hub.address}) for 2 s; is the network" in line
    assert line.endswith("go on with the same command and --resume")
    assert hidden(tmp_path) == [".out.partial"]
    hub.slow_files = set()
    hub.asked.clear()
    assert stream(tmp_path, *PLAIN, "--resume") == 0
    assert content(tmp_path / "out") == whole
    assert shards[1] not in weights(hub)


def test_a_shard_that_came_damaged_comes_again(hub: HubServer, shards: list[str], tmp_path: Path, capsys):
    whole = local(hub, tmp_path, *PLAIN)
    hub.flips = {shards[2]: 1}
    assert stream(tmp_path, *PLAIN) == 0
    assert content(tmp_path / "out") == whole
    assert f"{NAME}: {shards[2]}: came damaged (its SHA-256 is " in capsys.readouterr().err
    assert weights(hub).count(shards[2]) == 2


def test_a_damaged_shard_of_the_cache_is_refused(hub: HubServer, shards: list[str], tmp_path: Path, capsys):
    held = Path(hf_hub_download(NAME, shards[2], revision=COMMIT, cache_dir=constants.HF_HUB_CACHE))
    damage(held)
    line = failure(capsys, tmp_path, *PLAIN)
    assert f"{NAME}: {shards[2]} in the Hub's cache is damaged: its SHA-256 is " in line
    assert f"delete {held} and {held.resolve()}, and it is downloaded again" in line
    held.resolve().unlink()
    held.unlink()
    assert stream(tmp_path, *PLAIN, "--resume") == 0


def damage(path: Path) -> None:
    """Flip the last bit of a file."""
    held = path.read_bytes()
    path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
