"""Finds registers of a warpgroup's MMA that are written while it may still read them, in a kernel's machine code.

A warpgroup's MMA reads its A operand from registers while the warp goes on; PTX forbids to touch them before the wait.
Triton (3.6) keeps to that within one turn of a loop, but not across its end, and then results are wrong now and then.
MMAs end in groups, and a wait names how many of the latest ones it leaves.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from triton.knobs import nvidia

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);")
_MMA = re.compile(r"HGMMA\.64x\d+x16\S* R\d+, R(\d+), gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_BRANCH = re.compile(r"BRA\S*\s+(?:\S+, )?0x([0-9a-f]+)")
_DESTINATION = re.compile(r"(@!?U?P\w+ )?(\S+) +(?:U?P\w+, )?R(\d+)")
_NO_DESTINATION = (
    "ST",
    "LDGSTS",
    "RED",
    "HGMMA",
    "WARPGROUP",
    "ISETP",
    "FSETP",
    "HSETP2",
    "R2P",
    "R2UR",
    "BAR",
    "CCTL",
)


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """Return the address and text of each instruction."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        words = [nvidia.cuobjdump.path, "-sass", str(path)]
        text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = (_INSTRUCTION.match(line) for line in text.splitlines())
    return [(int(match[1], 16), match[2].strip()) for match in found if match]


def written(instruction: str) -> range:
    """Return the numbers of the registers that an instruction writes."""
    match = _DESTINATION.match(instruction)
    if match is None or match[2].startswith(_NO_DESTINATION):
        return range(0)
    name, first = match[2], int(match[3])
    if name.startswith("LDSM"):
        width = {"4": 4, "2": 2}.get(name[-1], 1)
    else:
        width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    return range(first, first + width)


def hazards(code: list[tuple[int, str]]) -> list[str]:
    """Return a line for each MMA whose A registers are written on some way to the wait for it."""
    place = {address: index for index, (address, _) in enumerate(code)}
    found = []
    for index, (_, text) in enumerate(code):
        match = _MMA.match(text)
        if match is not None:
            registers = set(range(int(match[1]), int(match[1]) + 4))
            found += [f"{text} | {step}" for step in _overwriting(code, place, index, registers)]
    return found


def _overwriting(code: list[tuple[int, str]], place: dict[int, int], index: int, registers: set[int]) -> list[str]:
    """Return what writes ``registers`` before the MMA at ``index`` is waited for, the first on each way."""
    found = []
    seen: set[tuple[int, int]] = set()
    ahead = [(index, 0)]  # where to go on, and how many groups have ended by then, the MMA's own included
    while ahead:
        at, groups = ahead.pop()
        while at < len(code) and (at, groups) not in seen:
            seen.add((at, groups))
            step = code[at][1]
            wait = _WAIT.match(step)
            if wait and groups > int(wait[1], 16):
                break
            if registers & set(written(step)):
                found.append(step)
                break
            if step.startswith("HGMMA") and "gsb0" in step:
                groups = min(groups + 1, 8)  # a wait leaves less
            branch = _BRANCH.search(step)
            if branch and int(branch[1], 16) in place:
                ahead.append((place[int(branch[1], 16)], groups))
            if not step.startswith("@") and (branch or step.startswith("EXIT")):
                break
            at += 1
    return found
