"""Models of the Hub where commands take a folder: the download, what is left out of it, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import COMMIT, OLD_COMMIT, HubServer, of_folder
from huggingface_hub import constants, hf_hub_download
from tiny_models import TEXT

from vllm_milo.offline.cli import main
from vllm_milo.offline.hub import download, listing, patience

FAST = ["--method", "rtn", "--quiet"]
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(hub: HubServer, deep_model: Path) -> str:
    """The bundled model on the Hub, beside weights in other formats."""
    others = {"pytorch_model.bin": b"x", "model.gguf": b"x", "original/model.safetensors": b"x"}
    hub.repositories["org/tiny"] = of_folder(deep_model, **others)
    hub.repositories["org/tiny"].commits[COMMIT]["README.md"] = b"---\nlicense: mit\nlanguage: en\n---\n# Tiny\n"
    return "org/tiny"


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command fails with."""
    assert main([*words]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


def test_a_model_is_downloaded_and_quantized(hub: HubServer, model: str, deep_model: Path, tmp_path: Path):
    out, local = tmp_path / "out", tmp_path / "local"
    assert main(["quantize", model, "-o", str(out), *FAST]) == 0
    assert main(["quantize", str(deep_model), "-o", str(local), *FAST]) == 0
    shard = "model-00001-of-00001.safetensors"
    assert (out / shard).read_bytes() == (local / shard).read_bytes()
    assert not {f"GET /org/tiny/resolve/{COMMIT}/{name}" for name in ("pytorch_model.bin", "model.gguf")} & {*hub.asked}
    assert not any("original" in line for line in hub.asked)
    card = (out / "README.md").read_text()
    assert "base_model: org/tiny" in card
    assert "license: mit" in card
    assert COMMIT in card
    assert (out / "README_SOURCE.md").read_text().endswith("# Tiny\n")
    assert hub.bytes_of_weights() == 1
    assert main(["verify", str(out), "--reference", model, "--quiet"]) == 0
    assert main(["quantize", model, "-o", str(tmp_path / "again"), *FAST]) == 0
    assert hub.bytes_of_weights() == 1  # the cache has it


def test_the_environment_of_the_library_counts(hub: HubServer, model: str, tmp_path: Path):
    """In a process of its own, as users run it: the library reads the environment when it is imported."""
    command = [sys.executable, "-m", "vllm_milo.offline.cli", "quantize", model, "-o", str(tmp_path / "out"), *FAST]
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "org/tiny: downloading" in done.stderr
    assert (tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / COMMIT / WEIGHTS).exists()
    hub.shutdown()
    shutil.rmtree(tmp_path / "out")
    done = subprocess.run(
        command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_revisions(hub: HubServer, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    repository = hub.repositories[model]
    repository.commits[OLD_COMMIT] = repository.commits[COMMIT] | {"old.txt": b"of the branch"}
    repository.revisions["refs/pr/1"] = OLD_COMMIT
    assert main(["quantize", f"{model}@refs/pr/1", "-o", str(tmp_path / "out"), *FAST]) == 0
    assert (tmp_path / "out" / "old.txt").exists()
    assert OLD_COMMIT in (tmp_path / "out" / "README.md").read_text()
    line = failure(capsys, "quantize", f"{model}@nowhere", "-o", str(tmp_path / "none"), *FAST)
    assert line.endswith(
        "org/tiny@nowhere: the model has no such revision; name a branch, a tag or a whole commit hash"
    )


def test_models_that_cannot_be_had(hub: HubServer, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ["-o", str(tmp_path / "out"), *FAST]
    line = failure(capsys, "quantize", "org/none", *out)
    assert "org/none: there is neither such a folder nor such a model on the Hugging Face Hub; if it is" in line
    hub.repositories[model].gated = True
    line = failure(capsys, "quantize", model, *out)
    assert "org/tiny: is gated, and the token may not read it (403); accept its terms" in line
    del hub.repositories[model].commits[COMMIT][WEIGHTS]
    assert "has no *.safetensors file at its top" in failure(capsys, "quantize", model, *out)
    hub.shutdown()
    hub.server_close()
    line = failure(capsys, "quantize", model, *out)
    assert f"org/tiny: the Hugging Face Hub ({hub.address}) cannot be reached: " in line
    assert not (tmp_path / "out").exists()


def test_offline(hub: HubServer, model: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = failure(capsys, "quantize", model, "-o", str(tmp_path / "out"), *FAST)
    assert "not as a whole, in the Hub's cache" in line
    assert hub.asked == []


def test_a_disk_without_room(hub: HubServer, model: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(download, "free_bytes", lambda place: 2**20)
    line = failure(capsys, "quantize", model, "-o", str(tmp_path / "out"), *FAST)
    assert "org/tiny: the download takes " in line
    assert "and 1.0 MiB are free in the Hub's cache" in line
    assert hub.bytes_of_weights() == 0


def test_options_are_checked_before_the_download(hub: HubServer, model: str, tmp_path: Path, capsys):
    line = failure(capsys, "quantize", model, "-o", str(tmp_path / "out"), "--ignore", "nothing.of.it", *FAST)
    assert "nothing.of.it" in line
    assert hub.bytes_of_weights() == 0


def test_texts_are_looked_for_before_the_download(hub: HubServer, model: str, capsys):
    assert "none.txt: cannot be read" in failure(capsys, "eval", model, "--text", "none.txt", "--quiet")
    assert hub.bytes_of_weights() == 0


def test_a_model_of_the_hub_is_evaluated(hub: HubServer, model: str, deep_model: Path, capsys):
    words = ["--text", str(TEXT), "--max-windows", "1", "--quiet", "--json"]
    assert main(["eval", model, *words, "--reference", model]) == 0
    assert json.loads(capsys.readouterr().out)["mean_kl"] == 0


def test_a_hub_that_fails_on_the_way(hub: HubServer, model: str, tmp_path: Path, capsys):
    hub.broken_files = {WEIGHTS}
    line = failure(capsys, "quantize", model, "-o", str(tmp_path / "out"), *FAST)
    assert "org/tiny: the Hugging Face Hub answers 500: " in line


def test_weights_that_came_damaged_come_again(hub: HubServer, model: str, tmp_path: Path, capsys):
    hub.flips = {WEIGHTS: 1}
    assert main(["quantize", model, "-o", str(tmp_path / "out"), *FAST]) == 0
    assert f"org/tiny: {WEIGHTS}: came damaged (its SHA-256 is " in capsys.readouterr().err
    assert hub.bytes_of_weights() == 2
    hub.flips = {WEIGHTS: 2}
    shutil.rmtree(tmp_path / "cache")
    line = failure(capsys, "quantize", model, "-o", str(tmp_path / "again"), *FAST)
    said = hashlib.sha256(hub.repositories[model].commits[COMMIT][WEIGHTS]).hexdigest()
    assert f"org/tiny: {WEIGHTS}: came damaged twice" in line
    assert f"and the Hub says {said}; it was deleted" in line
    assert not any(path.stat().st_size > 2**20 for path in (tmp_path / "cache").rglob("*"))
    assert main(["quantize", model, "-o", str(tmp_path / "again"), *FAST]) == 0


def test_damaged_weights_of_the_cache_are_refused(hub: HubServer, model: str, tmp_path: Path, capsys):
    """Another program may have put them there: they are named, and not deleted."""
    held = Path(hf_hub_download(model, WEIGHTS, revision=COMMIT, cache_dir=constants.HF_HUB_CACHE))
    content = held.read_bytes()
    held.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    line = failure(capsys, "quantize", model, "-o", str(tmp_path / "out"), *FAST)
    assert f"org/tiny: {WEIGHTS} in the Hub's cache is damaged: its SHA-256 is " in line
    assert f"delete {held} and {held.resolve()}, and it is downloaded again" in line
    assert held.exists()
    held.write_bytes(content)
    assert main(["quantize", model, "-o", str(tmp_path / "out"), *FAST]) == 0


def test_a_hub_that_says_no_hashes(hub: HubServer, model: str, tmp_path: Path):
    hub.says_hashes = False
    assert main(["quantize", model, "-o", str(tmp_path / "out"), *FAST]) == 0


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json"])
def test_a_hub_that_trickles(hub: HubServer, model: str, file: str, tmp_path: Path):
    """Is left after a while, and the process ends, whatever still waits in the library; the next goes on."""
    hub.slow_files = {file}
    code = (
        "import sys; from vllm_milo.offline.cli import main; from vllm_milo.offline.hub import patience; "
        "patience.SECONDS = 2; sys.exit(main(sys.argv[1:]))"
    )
    words = ["quantize", model, "-o", str(tmp_path / "out"), *FAST]
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert f"org/tiny: nothing came from the Hugging Face Hub ({hub.address}) for 2 s; is" in done.stderr
    assert not (tmp_path / "out").exists()
    hub.slow_files = set()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_hub_that_says_nothing_of_a_model(hub: HubServer, model: str, tmp_path: Path, monkeypatch, capsys):
    """The library's own limits are for silence between two bytes."""
    monkeypatch.setattr(patience, "SECONDS", 1)
    monkeypatch.setattr(listing.HfApi, "model_info", lambda *_, **__: time.sleep(20))
    line = failure(capsys, "quantize", model, "-o", str(tmp_path / "out"), *FAST)
    assert "org/tiny: nothing came from the Hugging Face Hub" in line


def test_a_server_that_is_no_hub(hub: HubServer, model: str, tmp_path: Path, capsys):
    """As a proxy that answers for it."""
    for answer in (b"<html>Log in</html>", b"[]", b"null", b"{}"):
        hub.wrong_answer = answer
        line = failure(capsys, "quantize", model, "-o", str(tmp_path / "out"), *FAST)
        assert f"{model}: the answer of {hub.address} is none of a Hugging Face Hub's" in line
        assert "is HF_ENDPOINT right" in line


def test_a_dry_run_reads_headers(hub: HubServer, model: str, deep_model: Path, tmp_path: Path, capsys):
    words = ["-o", str(tmp_path / "out"), "--dry-run", "--json", "--preset", "fast"]
    assert main(["quantize", model, *words]) == 0
    said = capsys.readouterr()
    assert "org/tiny: only headers are read; the whole takes a download of " in said.err
    assert main(["quantize", str(deep_model), *words]) == 0
    remote, local = json.loads(said.out), json.loads(capsys.readouterr().out)
    assert remote["model"] == "org/tiny"
    for key in ("bytes", "bits_per_weight", "by_kind", "quantized_weights", "format"):
        assert remote[key] == local[key]
    assert hub.bytes_of_weights() == 0
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_inspected_by_its_headers(hub: HubServer, checkpoint: Path, capsys):
    hub.repositories["org/milo"] = of_folder(checkpoint)
    assert main(["inspect", "org/milo", "--json"]) == 0
    remote = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    assert remote == json.loads(capsys.readouterr().out)
    assert hub.bytes_of_weights() == 0


def test_folders_come_first(hub: HubServer, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "config.json" in failure(capsys, "inspect", "org/tiny")
    assert "no such folder" in failure(capsys, "verify", "./org/none")
    assert hub.asked == []
