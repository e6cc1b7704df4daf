"""`--delete-source-shards`: the same bytes from shards that come and go, and what is left when that ends early."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from hub_server import COMMIT, OLD_COMMIT, HubServer
from hub_streams import ALONG, NAME, PLAIN, STREAM, by_layer, content, failure, hidden, local, put, stream, weights
from huggingface_hub import constants, hf_hub_download
from quantized_sources import WAYS, write_both
from safetensors.torch import load_file

from vllm_milo.offline.cli import main
from vllm_milo.offline.hub.shards import HubShards


def cached_weights(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))


def watch(hub: HubServer, tmp_path: Path) -> list[int]:
    """Will hold how many shards took room on the disk at each download, that one counted.

    A deleted file does as long as somebody has it in memory.
    """
    seen: list[int] = []
    source = tmp_path / ".out.partial" / "source"

    def before(_: str) -> None:
        names = {path.name for path in source.glob("*.safetensors")}
        if (maps := Path("/proc/self/maps")).exists():
            names |= set(re.findall(rf"{re.escape(str(source))}/(\S+)", maps.read_text()))
        seen.append(1 + len(names))

    hub.before_weights = before
    return seen


def hold_for_downloads(monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    """Let no shard go before all downloads that were begun have reached the server.

    A layer that takes less time than a request does would be deleted before the next one's is counted.
    """
    real = HubShards.used

    def used(self: HubShards, layers: Iterable[str]) -> None:
        begun.update(self._came)
        end = time.monotonic() + 30
        while len(seen) < len(begun):
            assert time.monotonic() < end, f"{len(begun)} downloads were begun and {len(seen)} reached the server"
            time.sleep(0.005)
        real(self, layers)

    begun: set[str] = set()
    monkeypatch.setattr(HubShards, "used", used)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (PLAIN, 3),
        (["--method", "hqq", *PLAIN[2:]], 3),
        (["--method", "paper", "--ranks", "dense=8", "--max-rounds", "1", *PLAIN[2:]], 3),
        (["--preset", "fast", "--max-rounds", "1", *PLAIN[2:]], 3),
        (ALONG, 2),
    ],
    ids=["rtn", "hqq", "paper", "fast", "balanced"],
)
def test_the_same_bytes_from_few_shards(
    hub: HubServer, shards: list[str], options: list[str], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = local(hub, tmp_path, *options)
    seen = watch(hub, tmp_path)
    hold_for_downloads(monkeypatch, seen)
    assert stream(tmp_path, *options) == 0
    assert content(tmp_path / "out") == whole
    assert f"commit `{COMMIT}`" in whole["README.md"].decode()
    assert sorted(weights(hub)) == shards  # each once
    assert max(seen[:3]) <= 3  # the two that hold what lies outside of layers, and the next one
    assert max(seen[3:]) <= most < len(shards)
    assert min(seen[3:]) > 1  # the next one comes ahead
    assert hidden(tmp_path) == []
    assert cached_weights(tmp_path) == []


@pytest.mark.parametrize("options", [PLAIN, ALONG], ids=["rtn", "balanced"])
def test_scales_in_other_shards_than_their_weights(hub: HubServer, deep_model: Path, options: list[str], tmp_path):
    """Both are there when a matrix is read, and go when the layer is finished."""
    source = write_both(deep_model, tmp_path / "fp8", WAYS["fp8 blocks"]).source
    shards = put(hub, source, lambda name: 2 * by_layer(name) + int(name.endswith("weight_scale_inv")))
    assert len(shards) == 10
    whole = local(hub, tmp_path, *options)
    seen = watch(hub, tmp_path)
    assert stream(tmp_path, *options) == 0
    assert content(tmp_path / "out") == whole
    assert sorted(weights(hub)) == shards  # each once
    assert max(seen) <= 5  # two of a layer, of the one before and the next one
    assert hidden(tmp_path) == []


def test_layers_that_lie_in_several_shards(hub: HubServer, deep_model: Path, tmp_path: Path):
    """As shards of a size have them, of which the last holds layers and what lies outside of them."""
    order = [f"model.layers.{layer}." for layer in range(4)]
    places: dict[str, int] = {}
    for name in load_file(deep_model / "model.safetensors"):
        layer = next((number for number, prefix in enumerate(order) if name.startswith(prefix)), None)
        experts = ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) >= 2
        places[name] = 0 if "embed" in name else 4 if layer is None else layer + int(experts)
    shards = put(hub, deep_model, places.__getitem__)
    whole = local(hub, tmp_path, *ALONG)
    seen = watch(hub, tmp_path)
    assert stream(tmp_path, *ALONG) == 0
    assert content(tmp_path / "out") == whole
    assert sorted(weights(hub)) == shards
    assert max(seen) <= 4  # two of a layer, the next one, and the last


def test_what_was_in_the_cache_stays(hub: HubServer, shards: list[str], tmp_path: Path):
    whole = local(hub, tmp_path, *PLAIN)
    before = shards[1], shards[3]
    for name in before:
        hf_hub_download(NAME, name, revision=COMMIT, cache_dir=constants.HF_HUB_CACHE)
    hub.asked.clear()
    assert stream(tmp_path, *PLAIN) == 0
    assert content(tmp_path / "out") == whole
    assert sorted(weights(hub)) == [name for name in shards if name not in before]
    assert cached_weights(tmp_path) == sorted(before)


def run(hub: HubServer, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    """A conversion in a process of its own."""
    command = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", NAME, "-o", str(tmp_path / "out"), STREAM]
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache")}
    return subprocess.Popen([*command, *options], env=environment, stderr=subprocess.PIPE, text=True)


def end_at(hub: HubServer, shard: str, number: int, processes: list[subprocess.Popen[str]]) -> None:
    """Let a signal end the process when it asks for a shard, which does not come before that."""

    def before(file: str) -> None:
        if file == shard:
            processes[0].send_signal(number)
            processes[0].wait(timeout=60)

    hub.before_weights = before


@pytest.mark.parametrize("options", [PLAIN, ALONG], ids=["plain", "along a text"])
def test_a_killed_conversion_goes_on(hub: HubServer, shards: list[str], options: list[str], tmp_path: Path, capsys):
    whole = local(hub, tmp_path, *options)
    processes: list[subprocess.Popen[str]] = []
    end_at(hub, shards[4], signal.SIGKILL, processes)
    processes.append(run(hub, tmp_path, *options))
    processes[0].communicate(timeout=120)
    assert processes[0].returncode == -signal.SIGKILL
    assert hidden(tmp_path) == [".out.milo-lock", ".out.partial"]
    assert list((tmp_path / ".out.partial" / "source").glob("*.safetensors"))  # stale
    finished = len(list((tmp_path / ".out.partial" / "layers").glob("*.json"))) - 1  # without what lies outside
    assert 1 <= finished < 4
    hub.asked.clear()
    seen = watch(hub, tmp_path)
    capsys.readouterr()
    assert stream(tmp_path, *[option for option in options if option != "--quiet"], "--resume") == 0
    assert content(tmp_path / "out") == whole
    again = shards[1 + finished : 5] if options is PLAIN else shards[:5]
    assert sorted(weights(hub)) == again
    assert ("their shards are downloaded again" in capsys.readouterr().err) == (options is ALONG)
    assert max(seen) <= 3
    assert hidden(tmp_path) == []


def test_an_interrupt_waits_for_no_download(hub: HubServer, shards: list[str], tmp_path: Path):
    processes: list[subprocess.Popen[str]] = []
    end_at(hub, shards[4], signal.SIGTERM, processes)
    processes.append(run(hub, tmp_path, *PLAIN))
    said = processes[0].communicate(timeout=120)[1].splitlines()[-1]
    assert processes[0].returncode == 143
    assert "layers are kept in" in said
    assert hidden(tmp_path) == [".out.partial"]
    assert not (tmp_path / ".out.partial" / "source").exists()
    hub.before_weights = lambda _: None
    assert stream(tmp_path, *PLAIN, "--resume") == 0


def test_the_whole_snapshot_goes_on(hub: HubServer, shards: list[str], tmp_path: Path, capsys):
    """A commit is the same model, whichever way its shards come."""
    whole = local(hub, tmp_path, *PLAIN)
    hub.withdrawn_files = {shards[4]}
    failure(capsys, tmp_path, *PLAIN)
    hub.withdrawn_files = set()
    assert main(["quantize", NAME, "-o", str(tmp_path / "out"), *PLAIN, "--resume"]) == 0
    assert content(tmp_path / "out") == whole
    assert cached_weights(tmp_path) == shards


def test_another_commit_is_another_model(hub: HubServer, shards: list[str], tmp_path: Path, capsys):
    hub.withdrawn_files = {shards[4]}
    failure(capsys, tmp_path, *PLAIN)
    hub.withdrawn_files = set()
    repository = hub.repositories[NAME]
    repository.commits[OLD_COMMIT] = dict(repository.commits[COMMIT])
    repository.revisions["main"] = OLD_COMMIT
    asked = len(weights(hub))
    line = failure(capsys, tmp_path, *PLAIN, "--resume")
    assert f"source: commit was {COMMIT} and is {OLD_COMMIT}" in line
    assert len(weights(hub)) == asked
    assert main(["quantize", f"{NAME}@{COMMIT}", "-o", str(tmp_path / "out"), STREAM, *PLAIN, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "best"], "--preset best trains the model as a whole"),
        (["--calibration", "self"], "with --calibration self the model writes as a whole"),
        (["--ranks", "kurtosis=16"], "--ranks ranks experts by kurtosis"),
        (["--preset", "paper-s1"], "--preset paper-s1 ranks experts by kurtosis"),
    ],
)
def test_what_needs_the_whole_model(hub: HubServer, shards, options: list[str], message: str, tmp_path, capsys):
    for more in ([], ["--dry-run"]):
        line = failure(capsys, tmp_path, *options, *more, "--quiet", "--device", "cpu")
        assert f"--delete-source-shards: {message}" in line
    assert weights(hub) == []
    assert hidden(tmp_path) == []


def test_folders_are_refused(hub: HubServer, deep_model: Path, tmp_path: Path, capsys):
    assert main(["quantize", str(deep_model), "-o", str(tmp_path / "out"), STREAM, *PLAIN]) == 1
    assert f"--delete-source-shards: {deep_model} is a folder, from which nothing is deleted" in (
        capsys.readouterr().err
    )


def test_the_hub_must_be_there(hub: HubServer, shards: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; leave one of them out" in failure(capsys, tmp_path, *PLAIN)


def test_a_disk_without_room(hub: HubServer, shards: list[str], tmp_path: Path, monkeypatch, capsys):
    words = ["quantize", NAME, "-o", str(tmp_path / "out"), "--dry-run", "--json", *PLAIN]
    assert main(words) == 0
    without = json.loads(capsys.readouterr().out)["disk_peak_bytes"]
    assert main([*words, STREAM]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == NAME
    sizes = [len(hub.repositories[NAME].commits[COMMIT][name]) for name in shards]
    assert sum(sorted(sizes)[-2:]) <= said["disk_peak_bytes"] - without < sum(sizes)
    monkeypatch.setattr("vllm_milo.offline.planning.disk.free_bytes", lambda _: said["disk_peak_bytes"] - 1)
    line = failure(capsys, tmp_path, *PLAIN)
    assert " of the source's shards, and " in line
    assert weights(hub) == []
    monkeypatch.setattr("vllm_milo.offline.planning.disk.free_bytes", lambda _: said["disk_peak_bytes"])
    assert stream(tmp_path, *PLAIN) == 0


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "holds NaN or Inf"), (1e6, "which 3 bits with fp16 scales cannot store")]
)
def test_broken_weights_are_found_when_they_come(hub, deep_model: Path, value: float, message: str, tmp_path, capsys):
    name = "model.layers.2.self_attn.q_proj.weight"
    broken = load_file(deep_model / "model.safetensors")[name]
    broken[3, 5] = value
    shards = put(hub, deep_model, by_layer, **{name: broken})
    line = failure(capsys, tmp_path, *ALONG)
    assert f"{shards[3]}: tensor {name} holds" in line
    assert message in line
    assert {*weights(hub)} <= {*shards}
    assert hidden(tmp_path) == []
