"""The source's other files: what comes along, and what stays."""

from __future__ import annotations

import shutil
from pathlib import Path

from refusals import FAST

from vllm_milo.offline.checkpoint.companions import find_companions
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.verify import verify_checkpoint


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_folders_come_along(source: Path, tmp_path: Path):
    kept = ["additional_chat_templates/tool_use.jinja", "code/deep/modeling.py", "LICENSE", "vocab.json"]
    left = [
        *(f"other/weights.{end}" for end in ("bin", "pt", "pth", "gguf", "onnx", "safetensors", "h5", "BIN")),
        *(".git/config", "code/.hidden", "code/__pycache__/modeling.pyc", "other/pytorch_model.bin.index.json"),
    ]
    for name in (*kept, *left):
        write(source / name)
    out = convert(source, tmp_path / "out", Conversion(FAST), progress=False).out
    held = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(kept) <= held
    assert not set(left) & held
    verdict = verify_checkpoint(out)
    assert verdict.good, verdict.problems
    write(out / kept[0], "y")
    assert "additional_chat_templates/tool_use.jinja" in verify_checkpoint(out).problems[0]


def test_links_are_followed_in_the_model_alone(source: Path, tmp_path: Path):
    secret = write(tmp_path / "secret.txt")
    (source / "stolen.txt").symlink_to(secret)
    (source / "folder").symlink_to(tmp_path)
    write(source / "real.txt")
    (source / "alias.txt").symlink_to("real.txt")
    (source / "gone.txt").symlink_to("nowhere")
    summary = convert(source, tmp_path / "out", Conversion(FAST), progress=False)
    held = {path.name for path in summary.out.iterdir()}
    assert {"real.txt", "alias.txt"} <= held
    assert not {"stolen.txt", "folder", "gone.txt"} & held
    assert sum("is not copied: it is a link to" in warning for warning in summary.warnings) == 2
    assert any(f"stolen.txt: is not copied: it is a link to {secret}" in warning for warning in summary.warnings)


def test_links_of_the_hubs_cache(source: Path, tmp_path: Path):
    """There every file is a link from ``snapshots`` to ``blobs``."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(source, snapshot)
    blob = write(blobs / "89ab")
    (snapshot / "templates").mkdir()
    (snapshot / "merges.txt").symlink_to(Path("../../blobs/89ab"))
    (snapshot / "templates" / "a.jinja").symlink_to(Path("../../../blobs/89ab"))
    found = find_companions(snapshot)
    assert found.files["merges.txt"] == found.files["templates/a.jinja"] == blob.resolve()
    assert found.warnings == []
