"""Kernels are launched on the device of their tensors, whichever is current."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from random_layers import random_linear
from readme import ROOT

from vllm_milo.kernels import ops, reference
from vllm_milo.kernels.launch import device_of
from vllm_milo.kernels.weights import LinearWeights


def guarded(tree: ast.AST, is_launch: Any) -> list[tuple[int, bool]]:
    """The line of each launch, and whether it is inside ``with device_of(…)``."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            inside |= any(isinstance(call.func, ast.Name) and call.func.id == "device_of" for call in calls)
        if isinstance(node, ast.Call) and is_launch(node.func):
            found.append((node.lineno, inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, inside=False)
    return found


def test_the_converters_launches_are_guarded_each():
    number = 0
    for path in (ROOT / "kernels" / "convert").glob("*.py"):
        for line, inside in guarded(ast.parse(path.read_text()), lambda func: isinstance(func, ast.Subscript)):
            assert inside, f"{path.name}:{line}"
            number += 1
    assert number == 5


def test_serving_launches_are_guarded_once_a_layer():
    """All of them go through launch(), or a recording of it, below the operators."""
    direct = [
        path.name
        for path in (ROOT / "kernels").rglob("*.py")
        if path.parent.name != "convert"
        and guarded(
            ast.parse(path.read_text()), lambda f: isinstance(f, ast.Subscript) and ast.unparse(f.slice) == "grid"
        )
    ]
    assert direct == ["launch.py"]
    tree = ast.parse((ROOT / "kernels" / "ops.py").read_text())
    calls = ("triton_linear.linear", "wide.wide_linear", "layer.fused_moe", "layer.routed_moe")
    layers = guarded(tree, lambda func: ast.unparse(func) in calls)
    assert [inside for _, inside in layers] == [True, True, True, True]


def test_nothing_is_switched_without_need(monkeypatch: pytest.MonkeyPatch):
    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 1)

        def get_device(self) -> int:
            return 1

    switched = []
    monkeypatch.setattr(torch.cuda, "device", switched.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with device_of(torch.zeros(1)), device_of(OnGpu()):  # type: ignore[arg-type]
        assert not switched
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device_of(OnGpu())  # type: ignore[arg-type]
    assert switched == [torch.device("cuda", 1)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_kernels_run_on_the_second_gpu_while_the_first_is_current():
    from vllm_milo.kernels.convert import feedback, grid_fit
    from vllm_milo.offline.solve.base.group import quantize_rtn

    torch.cuda.set_device(0)
    weights = torch.randn(2, 64, 256) * 0.05
    grid = quantize_rtn(weights, 64)
    moved = [part.to("cuda:1") for part in (weights, grid.scale, grid.zero)]
    codes = grid_fit.nearest_codes(*moved)
    assert codes.device.index == 1
    assert (codes.cpu() != grid.codes).float().mean() < 1e-3
    factor = torch.eye(64, device="cuda:1").expand(2, 64, 64).contiguous()
    own = torch.empty(2, 64, 64, dtype=torch.uint8, device="cuda:1")
    feedback.quantize_group(
        moved[0][..., :64].contiguous(), factor, moved[1][..., 0].float(), moved[2][..., 0].float(), own
    )
    assert (own.cpu() != grid.codes[..., :64]).float().mean() < 1e-3
    layer, spec = random_linear([64, 128], [16, 8], 256, 64, 3)
    x = torch.randn(5, 256).bfloat16()
    prepared = ops.prepare_linear(LinearWeights(*(part.to("cuda:1") for part in layer)), spec, "triton")
    found = ops.linear(x.to("cuda:1"), prepared, spec, "triton")
    expected = reference.linear(x.double(), layer, spec)
    assert found.device.index == 1
    assert (found.cpu().double() - expected).norm() / expected.norm() < 0.02
    assert torch.cuda.current_device() == 0
