"""`milo quantize --push-to`: what is refused before the conversion, what is committed, what a failure leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, Repository, of_folder
from huggingface_hub import constants

from vllm_milo.offline.cli import main


def push(bundled_model: Path, out: Path, *options: str) -> int:
    words = ["quantize", str(bundled_model), "-o", str(out), "--method", "rtn", "--quiet", *options]
    return main([*words] if "--push-to" in options else [*words, "--push-to", "org/tiny-milo"])


def test_a_checkpoint_is_pushed(hub: HubServer, bundled_model: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert push(bundled_model, out, "--private") == 0
    assert f"pushed to {hub.address}/org/tiny-milo" in capsys.readouterr().out
    repository = hub.repositories["org/tiny-milo"]
    assert repository.private
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert repository.commits[COMMIT] == files
    card = files["README.md"].decode()
    assert "vllm serve org/tiny-milo --quantization milo" in card
    assert "# tiny-qwen2-moe, 3 bits (MiLo)" in card
    assert str(tmp_path) not in card
    assert str(bundled_model.parent) not in card


def test_shards_of_an_earlier_checkpoint_go(hub: HubServer, bundled_model: Path, checkpoint: Path, tmp_path: Path):
    stale = {"model-00002-of-00002.safetensors": b"x"}
    hub.repositories["org/tiny-milo"] = of_folder(checkpoint, **stale)
    assert push(bundled_model, tmp_path / "out") == 0
    held = hub.repositories["org/tiny-milo"].commits[COMMIT]
    assert not stale.keys() & held.keys()
    assert main(["inspect", "org/tiny-milo"]) == 0


def refused(hub: HubServer, bundled_model: Path, tmp_path: Path, capsys, *options: str) -> str:
    """The line of a failure before the conversion."""
    assert push(bundled_model, tmp_path / "out", *options) == 1
    assert not (tmp_path / "out").exists()
    assert not any("create" in line for line in hub.asked)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_tokens_that_may_not_write(hub: HubServer, bundled_model: Path, tmp_path: Path, monkeypatch, capsys):
    every = (hub, bundled_model, tmp_path, capsys)
    assert "--push-to else/x: the token is of me, who is not in an organization" in refused(
        *every, "--push-to", "else/x"
    )
    hub.repositories["org/tiny-milo"] = Repository(writable=False)
    assert "--push-to org/tiny-milo: the token may not write to it" in refused(*every)
    assert hub.account is not None
    hub.account["auth"]["accessToken"]["role"] = "read"
    assert "--push-to org/tiny-milo: the token may only read" in refused(*every)
    hub.account = None
    assert "does not accept the token (401)" in refused(*every)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token of the Hugging Face Hub; set HF_TOKEN or run" in refused(*every)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it" in refused(*every)


def test_other_models_are_kept(hub: HubServer, bundled_model: Path, tmp_path: Path, capsys):
    hub.repositories["org/tiny-milo"] = of_folder(bundled_model)
    assert "holds a model that is no MiLo checkpoint" in refused(hub, bundled_model, tmp_path, capsys)


def test_a_failed_upload_leaves_the_checkpoint(hub: HubServer, bundled_model: Path, tmp_path: Path, capsys):
    hub.fail_commits = True
    out = tmp_path / "out"
    assert push(bundled_model, out) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "--push-to org/tiny-milo: the upload failed: " in line
    assert f"`hf upload org/tiny-milo {out} .`" in line
    assert main(["verify", str(out), "--quiet"]) == 0


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me", ""])
def test_names_of_targets(bundled_model: Path, tmp_path: Path, name: str, capsys):
    with pytest.raises(SystemExit):
        push(bundled_model, tmp_path / "out", "--push-to", name)
    assert "is no name of a repository; give org/name" in capsys.readouterr().err


def test_private_alone(bundled_model: Path, tmp_path: Path, capsys):
    assert main(["quantize", str(bundled_model), "-o", str(tmp_path / "out"), "--private"]) == 1
    assert "--private is for --push-to alone" in capsys.readouterr().err
