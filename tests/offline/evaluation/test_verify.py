"""`milo verify`: each kind of damage is named by its file, tensor or matrix; good checkpoints pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folder_edits import edit_tensors
from refusals import FAST, WEIGHTS
from safetensors.torch import save_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM

from vllm_milo.offline.checkpoint.manifest import MANIFEST_NAME
from vllm_milo.offline.cli import main
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.against_source import relative_error, same_bits
from vllm_milo.offline.evaluation.verify import format_verdict, verify_checkpoint
from vllm_milo.offline.ranks.policies import parse_policies

ONLY_SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def sharded(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the Mixtral in several shards; not to be changed."""
    conversion = Conversion(FAST, parse_policies("dense=8"), shard_bytes=150_000)
    return convert(sources["mixtral"], tmp_path_factory.mktemp("sharded") / "milo", conversion, progress=False).out


@pytest.fixture
def out(sharded: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "out"))


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    assert len(found) > 2
    return found


def problems(folder: Path, reference: Path | None = None) -> list[str]:
    return verify_checkpoint(folder, reference).problems


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "odd", "bundled"])
def test_good_checkpoints(family: str, checkpoints, sources, odd_model: Path, bundled_model: Path):
    models = {**sources, "odd": odd_model, "bundled": bundled_model}
    verdict = verify_checkpoint(checkpoints[family], models[family])
    assert verdict.good, verdict.problems
    assert verdict.notes == []
    report = json.loads((checkpoints[family] / "milo_report.json").read_text())["matrices"]
    assert verdict.likeness.errors.keys() == report.keys()
    for name, error in verdict.likeness.errors.items():
        assert error == pytest.approx(report[name]["error"], rel=1e-3), name
    assert verdict.likeness.copied > 5


def test_the_command(sharded: Path, sources: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    words = ["verify", str(sharded), "--reference", str(sources["mixtral"]), "--quiet"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"{sharded}: good\n")
    assert f"read and compared with {MANIFEST_NAME}" in said
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["good"]
    assert found["files"] == len(list(sharded.iterdir())) - 2  # itself and the card
    largest = list(found["reference"]["largest_errors"].values())
    assert len(largest) == 5
    assert largest == sorted(largest, reverse=True)
    assert largest[0] >= found["reference"]["mean_error"]


def test_the_command_fails(out: Path, capsys: pytest.CaptureFixture[str]):
    shards(out)[0].unlink()
    assert main(["verify", str(out), "--quiet"]) == 1
    said = capsys.readouterr()
    assert f"problem: {shards_name(1, out)}: missing" in said.out
    assert said.out.endswith("NOT GOOD\n")
    assert said.err == f"milo verify: error: {out}: 2 problems found\n"  # the manifest's, and the format's
    assert main(["verify", str(out), "--quiet", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["good"] is False
    assert main(["verify", str(out / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_conversion_that_has_not_ended_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As a kill leaves it: the folder beside the output, not the output."""
    (tmp_path / ".out.partial").mkdir()
    assert main([command, str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "out: its conversion has not ended" in said
    assert "--resume" in said
    (tmp_path / "link").symlink_to("out")
    assert main([command, str(tmp_path / "link")]) == 1
    assert "has not ended" in capsys.readouterr().err
    (tmp_path / "out").mkdir()  # an older checkpoint, which the conversion is to replace
    assert main([command, str(tmp_path / "out")]) == 1
    assert not any("has not ended" in text for text in capsys.readouterr())


def shards_name(number: int, folder: Path) -> str:
    total = next(folder.glob("*.safetensors")).name.partition("-of-")[2]
    return f"model-{number:05d}-of-{total}"


def test_a_flipped_bit(out: Path):
    shard = shards(out)[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (problem,) = problems(out)
    assert problem.startswith(f"{shard.name}: damaged or changed: its size is right")


def test_a_flipped_bit_in_a_header(out: Path):
    shard = shards(out)[1]
    shard.write_bytes(shard.read_bytes().replace(b"data_offsets", b"data_offsete", 1))
    first, second = problems(out)
    assert first.startswith(f"{shard.name}: damaged")
    assert f"{shard.name}: its header is damaged: it says of tensor model.layers." in second
    assert second.endswith("; copy it again")


def test_a_truncated_shard(out: Path):
    shard = shards(out)[2]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1000])
    first, second = problems(out)
    assert (
        first == f"{shard.name}: truncated or changed: {size - 1000} bytes, but {size} by the manifest; copy it again"
    )
    assert f"{shard.name}: truncated" in second


def test_swapped_shards(out: Path):
    one, other = shards(out)[:2]
    one.rename(out / "aside")
    other.rename(one)
    (out / "aside").rename(other)
    found = problems(out)
    assert f"{one.name}: holds what belongs into {other.name}; were files swapped?" in found
    assert f"{other.name}: holds what belongs into {one.name}; were files swapped?" in found
    assert "is missing, but model.safetensors.index.json says it is there" in found[2]


def test_an_edited_config(out: Path):
    config = out / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 1', '"rope_theta": 2'))
    (problem,) = problems(out)
    assert problem.startswith("config.json: damaged or changed")
    config.write_text("{}")
    assert len(problems(out)) == 2


def test_a_stray_shard(out: Path):
    save_file({"x": torch.zeros(2)}, out / "stray.safetensors")
    (problem,) = problems(out)
    assert problem.startswith("stray.safetensors: extra, the manifest does not name it")


def test_what_users_add_is_no_failure(out: Path):
    (out / "README.md").write_text("# of mine")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    (out / "notes.json").write_text("{}")
    (out / ".milo.partial-7").mkdir()
    (out / ".cache" / "huggingface").mkdir(parents=True)
    (out / "code").mkdir()
    (out / "code" / "modeling.py").write_text("")
    verdict = verify_checkpoint(out)
    assert verdict.good
    assert verdict.notes == [
        "code/modeling.py: added, the manifest does not name it",
        "notes.json: added, the manifest does not name it",
    ]


def test_a_manifest_without_the_settings(out: Path):
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    del manifest["files"]["config.json"]
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    (problem,) = problems(out)
    assert problem.startswith(f"{MANIFEST_NAME}: does not name config.json")


def test_prose_of_the_source_may_change(source: Path, tmp_path: Path):
    for name in ("README.md", "LICENSE", "merges.txt"):
        (source / name).write_text("of the source")
    folder = convert(source, tmp_path / "out", Conversion(FAST), progress=False).out
    (folder / "README.md").write_text("of the checkpoint")
    (folder / "LICENSE").unlink()
    verdict = verify_checkpoint(folder)
    assert verdict.good
    assert [note.partition(":")[0] for note in verdict.notes] == ["LICENSE"]
    (folder / "README_SOURCE.md").unlink()
    (folder / "README.md").unlink()
    assert [note.partition(":")[0] for note in verify_checkpoint(folder).notes] == ["LICENSE", "README_SOURCE.md"]
    (folder / "merges.txt").write_text("")
    assert problems(folder) == ["merges.txt: truncated or changed: 0 bytes, but 13 by the manifest; copy it again"]


def test_a_broken_manifest_is_named_and_the_rest_is_checked(out: Path):
    (out / MANIFEST_NAME).write_text("{")
    shards(out)[0].unlink()
    first, second = problems(out)
    assert f"{MANIFEST_NAME}: not valid JSON" in first
    assert "no such file; the folder is incomplete" in second


def test_a_checkpoint_of_before(out: Path, sources: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    (out / MANIFEST_NAME).unlink()
    assert main(["verify", str(out), "--reference", str(sources["mixtral"]), "--quiet"]) == 0
    assert f"note: no {MANIFEST_NAME}: sizes and hashes of files were not checked" in capsys.readouterr().out
    verdict = verify_checkpoint(out)
    assert (verdict.good, verdict.files) == (True, None)
    for command in ("inspect", "verify"):
        assert main([command, str(out)]) == 0
    shards(out)[0].unlink()
    assert len(problems(out)) == 1


def test_another_model_as_reference(out: Path, sources: dict[str, Path], tmp_path: Path):
    retrained = make_model("mixtral", tmp_path / "retrained", seed=1)
    verdict = verify_checkpoint(out, retrained)
    assert sum("no good checkpoint reaches 1" in problem for problem in verdict.problems) == len(
        verdict.likeness.errors
    )
    assert "model.norm.weight: is not the reference's bit for bit" in verdict.problems
    assert "more problems" in format_verdict(verdict)
    (problem,) = problems(out, sources["olmoe"])
    assert "model_type is 'olmoe' there" in problem
    (problem,) = problems(out, out)
    assert "is a MiLo checkpoint; give the model that it was made of" in problem
    (problem,) = problems(out, tmp_path / "none")
    assert "none: no such folder" in problem


def test_fused_experts_as_reference(out: Path, sources: dict[str, Path], tmp_path: Path):
    fused = Path(shutil.copytree(sources["mixtral"], tmp_path / "fused"))
    model = AutoModelForCausalLM.from_pretrained(sources["mixtral"], dtype=torch.bfloat16)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(tensor.dim() == 3 for tensor in state.values())
    save_file(state, fused / WEIGHTS, metadata={"format": "pt"})
    plain, other = (verify_checkpoint(out, folder) for folder in (sources["mixtral"], fused))
    assert other.good, other.problems
    assert other.likeness.errors == plain.likeness.errors
    assert other.likeness.copied == plain.likeness.copied


def test_weights_that_are_not_the_sources(source: Path, tmp_path: Path):
    """Without a manifest the source tells: a scale gone wild, NaN, a norm off by a bit, a tensor too many."""
    ignore = ["re:.*layers\\.1\\.self_attn\\.o_proj"]
    folder = convert(source, tmp_path / "out", Conversion(FAST, ignore=ignore), progress=False).out
    (folder / MANIFEST_NAME).unlink()
    assert problems(folder, source) == []
    attention, kept = "model.layers.0.self_attn", "model.layers.1.self_attn.o_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{attention}.q_proj.weight_scale"] *= 16
        tensors[f"{attention}.k_proj.weight_zero"][0, 0] = float("nan")
        tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
        tensors[kept][0, 0] *= -1
        tensors["model.extra"] = torch.zeros(1)

    edit_tensors(folder, ONLY_SHARD, damage)
    verdict = verify_checkpoint(folder, source)
    assert {problem.partition(":")[0] for problem in verdict.problems} == {
        f"{attention}.q_proj",
        f"{attention}.k_proj",
        "model.norm.weight",
        "model.extra",
        kept,
    }
    assert list(verdict.likeness.largest(2)) == [f"{attention}.k_proj", f"{attention}.q_proj"]
    assert next(iter(verdict.to_dict()["reference"]["largest_errors"].values())) is None


def test_bits_and_errors():
    zero, minus = torch.zeros(1), -torch.zeros(1)
    assert torch.equal(zero, minus)
    assert not same_bits(zero, minus)
    assert same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert not same_bits(zero, zero.half())
    assert not same_bits(zero, zero[0])
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1, zero) == float("inf")
