"""One role quantized at a time: which matrices change, at how many bits, and what the benchmark says of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, make_model

from benchmarks import roles_alone
from benchmarks.divergence import HQQ
from vllm_milo.offline.effort import Effort
from vllm_milo.offline.source.reader import ModelReader

FFN = ["gate", "up", "down"]


@pytest.fixture
def run(bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    def command(*options: str) -> dict:
        monkeypatch.setattr("vllm_milo.offline.effort.CPU_EFFORT", Effort(4, 2, 2))
        always = [str(bundled_model), "--text", str(TEXT), "-o", str(tmp_path), "--device", "cpu", "--max-windows", "2"]
        monkeypatch.setattr(sys, "argv", ["roles_alone", *always, *options])
        roles_alone.main()
        return json.loads((tmp_path / roles_alone.FILE_NAME).read_text())

    return command


@pytest.mark.parametrize(
    ("family", "ffns"),
    [("mixtral", ["routed"]), ("qwen2_moe", ["shared", "routed", "dense"]), ("qwen3_moe", ["routed"])],
)
def test_roles_are_those_that_the_family_has(family: str, ffns: list[str], sources: dict[str, Path]):
    reader = ModelReader(sources[family])
    roles = roles_alone.find_roles(reader)
    assert list(roles) == [*"qkvo", *(f"{ffn}-{part}" for ffn in ffns for part in FFN)]
    assert sorted(matrix.name for held in roles.values() for matrix in held) == sorted(m.name for m in reader.matrices)


def fuse_experts(folder: Path) -> None:
    """Store the experts of a model in 3-D tensors, as some checkpoints do."""
    tensors = load_file(folder / "model.safetensors")
    experts = {name.split(".experts.")[0] for name in tensors if ".experts." in name}
    for block in experts:
        parts = {part: [] for part in FFN}
        for expert in range(6):
            for part in FFN:
                parts[part].append(tensors.pop(f"{block}.experts.{expert}.{part}_proj.weight"))
        both = zip(parts["gate"], parts["up"], strict=True)
        tensors[f"{block}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
        tensors[f"{block}.experts.down_proj"] = torch.stack(parts["down"])
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("family", "fused"), [("mixtral", False), ("qwen2_moe", False), ("qwen2_moe", True)])
def test_a_role_replaced_by_itself_changes_nothing_and_by_others_itself_alone(family: str, fused: bool, tmp_path: Path):
    source = make_model(family, tmp_path / "source")
    if fused:
        fuse_experts(source)
    reader = ModelReader(source)
    assert any(held.expert is not None for layer in reader.layers for held in layer.matrices) is fused
    cpu = torch.device("cpu")
    original = {m: values for layer in reader.layers for m, values in reader.load_layer(layer, cpu)}
    texts = {"text": torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))}

    def kl(factor: float, role: str) -> float:
        values = {matrix: original[matrix] * factor for matrix in roles_alone.find_roles(reader)[role]}
        model = roles_alone.with_matrices(reader, values, cpu, torch.float32)
        module = model.layer(1)
        held = dict(module.named_parameters())
        places = {name: held[mine].data for name, mine in model.parameters(1, module).items()}
        for matrix, before in original.items():
            if ".layers.1." in matrix.name:
                found = model.place(f"{matrix.name}.weight", places)[1]
                assert torch.equal(found, before * (factor if matrix in values else 1))
        model.drop(module)
        return roles_alone.measure(model, reader.folder, texts)["text"]["kl"]

    for role in ("k", "routed-up", "routed-down"):
        assert kl(1.0, role) < 1e-9 < 1e-5 < kl(0.5, role)


def test_rows_table_and_losses_on_the_bundled_model(run: Callable[..., dict], capsys: pytest.CaptureFixture[str]):
    content = run("--roles", "v", "routed-down")
    rows = {(row["role"], row["name"]): row for row in content["rows"]}
    assert len(rows) == 8
    for role in ("v", "routed-down"):
        hqq = rows[role, HQQ]
        assert hqq["bits"] == 3.5
        assert hqq["share"] == 0
        others = [rows[role, name] for name in ("paper", "fast", "balanced")]
        assert len({row["bits"] for row in others}) == len({row["mean_rank"] for row in others}) == 1
        assert 3.25 <= others[0]["bits"] <= 3.5
        assert all(0 < row["mean_kl"] < 0.5 and len(row["texts"][TEXT.name]["window_kl"]) == 2 for row in others)
    said = capsys.readouterr().out
    assert f"| v | 0.0655 | {rows['v', HQQ]['mean_kl']:.5f} (3.500) |" in said
    assert "Worse than a rival of equal or fewer bits:" in said


def test_losses_are_told_by_bits_and_come_with_their_error():
    def row(name: str, bits: float, kls: list[float]) -> dict:
        return {"role": "q", "name": name, "bits": bits, "texts": {"a": {"kl": sum(kls) / 2, "window_kl": kls}}}

    rows = [row(HQQ, 3.5, [0.2, 0.4]), row("paper", 3.4, [0.1, 0.1]), row("fast", 3.4, [0.3, 0.7])]
    rows.append(row("balanced", 3.4, [0.0, 0.0]))
    first, second = roles_alone.losses(rows)
    assert (first.ours, first.rival, second.rival) == ("fast", "paper", HQQ)
    assert second.error == pytest.approx(0.1)
    equal, more = roles_alone.describe_losses([first, second]).split("Worse than a rival of more bits:")
    assert "- q, a: `fast` 0.50000 at 3.400 bits, paper 0.10000 at 3.400; worse by 0.40000 ± 0.20000" in equal
    assert "HQQ g64 0.30000 at 3.500" in more
    assert "nowhere" in roles_alone.describe_losses([])


def test_contenders_can_be_chosen_and_an_unknown_role_is_refused(run: Callable[..., dict]):
    assert [row["name"] for row in run("--roles", "k", "--only", "fast")["rows"]] == [HQQ, "fast"]
    with pytest.raises(SystemExit, match="the model has no dense-up; it has q, k, v, o, shared-gate"):
        run("--roles", "dense-up")
