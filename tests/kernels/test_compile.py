"""The kernels compile for GPUs that are not there: what the interpreter cannot tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from register_hazards import hazards
from scripts import run_script


@pytest.mark.timeout(2400)  # as long as 14 minutes beside other work
@pytest.mark.parametrize(
    ("capability", "which", "least"),
    [
        (90, "few", 20),
        pytest.param(90, "usual portable", 20, marks=pytest.mark.slow),
        pytest.param(90, "all", 60, marks=pytest.mark.slow),
        pytest.param(80, "usual", 20, marks=pytest.mark.slow),
        pytest.param(89, "usual", 20, marks=pytest.mark.slow),
        # CI takes every format for 90 alone; 80 and 89 differ in shared memory
        pytest.param(80, "all", 50, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(89, "all", 50, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_every_kind_of_launch_compiles_and_fits(capability: int, which: str, least: int, tmp_path: Path):
    assert int(run_script("compile_for_gpu.py", str(capability), *which.split(), cache=tmp_path)) >= least


def test_the_search_for_hazards_follows_loops():
    mma = "HGMMA.64x16x16.F32 R32, R84, gdesc[UR24], R32, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    loop = [(0, "IADD3 R1, R1, 0x1, RZ"), (16, "LDSM.16.M88.4 R84, [R2]"), (32, wait), (48, mma), (64, "@P0 BRA 0x0")]
    end = [(80, wait), (96, "IMAD.MOV.U32 R84, RZ, RZ, 0x1"), (112, "EXIT")]
    assert hazards(loop + end) == [f"{mma} | LDSM.16.M88.4 R84, [R2]"]
    loop[1], loop[2] = (16, wait), (32, "LDSM.16.M88.4 R84, [R2]")
    assert hazards(loop + end) == []
    loop[0] = (0, "@!P1 IMAD.WIDE R86, R1, 0x2, R2")
    assert hazards(loop + end) == [f"{mma} | @!P1 IMAD.WIDE R86, R1, 0x2, R2"]
    loop[0] = (0, "STG.E [R84.64], R85")
    assert hazards(loop + end) == []


def test_the_search_for_hazards_counts_groups():
    """A wait that leaves three groups waits for the MMA before the last three."""
    write, wait = "LDSM.16.M88.4 R84, [R2]", "WARPGROUP.DEPBAR.LE gsb0, 0x3"
    first, *later = [f"HGMMA.64x16x16.F32 R32, R{84 + 4 * group}, gdesc[UR24], R32, gsb0" for group in range(4)]
    assert hazards(list(enumerate([first, *later, wait, write, "EXIT"]))) == []
    assert hazards(list(enumerate([first, *later[:2], wait, write, "EXIT"]))) == [f"{first} | {write}"]
    joined = first.removesuffix(", gsb0")  # its group ends with the next MMA
    assert hazards(list(enumerate([joined, *later, wait, write, "EXIT"]))) == [f"{joined} | {write}"]
