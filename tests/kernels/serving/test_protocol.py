"""The check of compiled kernels against the protocol of launches, on code small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from protocol_in_ptx import violations

from vllm_milo.kernels import serving
from vllm_milo.kernels.serving.protocol import STEPS

HEAD = """
.visible .entry k(
){
    ld.param.u64 %rd1, [k_param_0];
    ld.param.u64 %rd2, [k_param_1];
"""
WAIT = "griddepcontrol.wait;"
TRIGGER = "griddepcontrol.launch_dependents;"
LOAD_X, LOAD_DOWN, STORE = (
    "ld.global.b32 %r1, [ %rd1 + 0 ];",
    "ld.global.b32 %r2, [ %rd2 + 0 ];",
    "st.global.b32 [ %rd1 + 0 ], %r1;",
)
PRODUCT = "mma.sync.aligned.m16n8k16 {%r1}, {%r1};"


def breaches(kernel: str, names: list[str], *lines: str, ttir: str = "") -> list[str]:
    return violations(kernel, HEAD + "\n".join([*lines, "ret;", "}"]), ttir, names, True)


def test_a_kernel_waits_first():
    names = ["x", "y"]
    assert breaches("_activation_kernel", names, WAIT, TRIGGER, LOAD_X, STORE) == []
    assert "accesses ['x']" in breaches("_activation_kernel", names, LOAD_X, WAIT, TRIGGER, STORE)[0]
    assert "before it waits" in breaches("_activation_kernel", names, TRIGGER, WAIT, LOAD_X, STORE)[0]
    assert "never lets" in breaches("_activation_kernel", names, WAIT, LOAD_X, STORE)[0]
    assert "before the launch after" in breaches("_activation_kernel", names, WAIT, LOAD_X, TRIGGER, STORE)[0]
    skipped = ["@%p1 bra $L1;", WAIT, TRIGGER, LOAD_X, "$L1:"]
    assert breaches("_activation_kernel", names, *skipped) == ["has a way to its end without a wait"]


def test_a_gemm_waits_late():
    names = ["x", "down"]
    idle = ["@%p1 bra $L1;", "@%p2 bra $L2;", WAIT, "bra.uni $L2;", "$L1:"]
    work = [LOAD_X, PRODUCT, WAIT, TRIGGER, LOAD_DOWN, STORE, "$L2:"]
    assert breaches("gemm_kernel", names, *idle, *work) == []
    sooner = [LOAD_X, LOAD_DOWN, PRODUCT, WAIT, TRIGGER, STORE, "$L2:"]
    assert "accesses ['down']" in breaches("gemm_kernel", names, *idle, *sooner)[0]
    copied = [LOAD_X, "add.s64 %rd3, %rd2, 16;", "cp.async.cg.shared.global [ %r7 + 0 ], [ %rd3 + 0 ], 0x10;", *work]
    assert "accesses ['down']" in breaches("gemm_kernel", names, *idle, *copied)[0]
    stored = [LOAD_X, STORE, *work]
    assert "before it waits: st" in breaches("gemm_kernel", names, *idle, *stored)[0]
    assert breaches("gemm_kernel", names, "@%p1 bra $L2;", *work) == [
        "has no wait in the programs of blocks that are not in use"
    ]


NAMES = ["parts", "counters"]
PUT, BARRIER = "st.global.b32 [ %rd1 + 0 ], %r1;", "bar.sync 0;"
COUNT = "atom.global.gpu.acq_rel.add.u32 %r3, [ %rd2 + 0 ], 1;"
TAKE = "ld.global.cg.b32 %r4, [ %rd1 + 0 ];"
ASKED = "tt.store gpu.barrier tt.atomic_rmw"


@pytest.mark.parametrize(
    ("lines", "ttir", "breach"),
    [
        ([PUT, BARRIER, COUNT, TAKE], ASKED, None),
        ([PUT, COUNT, BARRIER, TAKE], ASKED, "no barrier before the atomic"),
        ([PUT, BARRIER, COUNT, TAKE], "tt.store tt.atomic_rmw gpu.barrier", "without having asked for a barrier"),
        ([PUT, BARRIER, COUNT.replace("acq_rel", "relaxed"), TAKE], ASKED, "without acquire and release"),
        ([PUT, BARRIER, COUNT.replace("gpu", "cta"), TAKE], ASKED, "at the scope of the GPU"),
        ([PUT, BARRIER, COUNT, TAKE.replace(".cg", "")], ASKED, "not from L2"),
        ([PUT, BARRIER, TAKE, COUNT], ASKED, "loads parts before it counts"),
    ],
)
def test_the_last_program_adds_what_all_stored(lines: list[str], ttir: str, breach: str | None):
    found = breaches("project_kernel", NAMES, WAIT, TRIGGER, *lines, ttir=ttir)
    assert found == [] if breach is None else any(breach in line for line in found)


def test_every_kernel_has_its_step():
    """A kernel of the table for each that serves; those of ``repack`` run once, when a layer is loaded."""
    kernels, folder = set(), Path(str(serving.__file__)).parent
    for path in set(folder.rglob("*.py")) - set((folder / "repack").iterdir()):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels.add(node.name)
                assert "protocol" in str(ast.get_docstring(node)), f"{node.name} names its step"
    assert kernels == {step.kernel for step in STEPS}
