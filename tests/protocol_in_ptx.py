"""Holds compiled kernels to :mod:`vllm_milo.kernels.serving.protocol`: what each may do before it waits.

PTX is read as a graph of instructions. Which memory an access touches is told by the kernel's parameters: a register
belongs to a parameter if it was computed from it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vllm_milo.kernels.serving.protocol import AT_ONCE, LATE, START, find_step

_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")
_REGISTER = re.compile(r"%(?:rd|r)\d+")
_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]")
_WRITTEN = re.compile(r"^(?:@!?%p\d+ )?[\w.:]+\s+(\{[^}]*\}|%\w+)(?:\|%\w+)?,\s*(.*)$")
_ADDRESS = re.compile(r"\[\s*(%rd\d+)")
_GLOBAL = re.compile(r"\b(ld|st|red|atom)\.[\w.]*global|\bcp\.async\.[\w.]*global|\b(ld|st)\.global")
_MMA = re.compile(r"\b(wgmma\.mma_async|mma\.sync)")
WAIT, TRIGGER, BARRIER = "griddepcontrol.wait", "griddepcontrol.launch_dependents", "bar.sync"


class Code(NamedTuple):
    """A kernel: its instructions, what may follow each, and the parameters that each accesses."""

    lines: list[str]
    after: list[list[int]]
    touched: list[set[str]]


def pointer_names(parameters: Iterable[str], arguments: Iterable[Any]) -> list[str]:
    """Return the name of each parameter of the machine code, which has none for None, and for 1 inside of a tuple."""
    names = []
    for parameter, argument in zip(parameters, arguments, strict=False):
        if isinstance(argument, tuple):
            fields = zip(type(argument)._fields, argument, strict=True)
            names += [
                name for name, value in fields if value is not None and not (isinstance(value, int) and value == 1)
            ]
        elif argument is not None:
            names.append(parameter)
    return names


def read(ptx: str, names: list[str]) -> Code:
    """Return the code of a kernel whose parameters have these names."""
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    lines, labels = [], {}
    for raw in body.splitlines():
        line = raw.split("//")[0].strip().rstrip(";").strip()
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(lines)
        elif line and not line.startswith((".", "{", "}")):
            lines.append(line)
        elif line.startswith("{") and len(line) > 1:
            lines.append(line[1:].strip())
    after = []
    for index, line in enumerate(lines):
        branch = _BRANCH.search(line)
        goes_on = line.startswith("@") or not (branch or re.match(r"(ret|exit|trap)\b", line))
        after.append([labels[branch[1]]] if branch else [])
        if goes_on and index + 1 < len(lines):
            after[-1].append(index + 1)
    owners = _owners(lines, names)
    touched = []
    for line in lines:
        address = _ADDRESS.search(line) if _GLOBAL.search(line) else None
        # of cp.async the second address is global
        if address and "cp.async" in line:
            address = list(_ADDRESS.finditer(line))[-1]
        touched.append(owners[address[1]] if address else set())
    return Code(lines, after, touched)


def _owners(lines: list[str], names: list[str]) -> dict[str, set[str]]:
    """Return the parameters that each register was computed from."""
    owners: dict[str, set[str]] = defaultdict(set)
    moves = []
    for line in lines:
        parameter = _PARAMETER.search(line)
        if parameter:
            if int(parameter[2]) < len(names):
                owners[parameter[1]] = {names[int(parameter[2])]}
        elif (written := _WRITTEN.match(line)) and not re.search(r"\b(ld|atom|st|cp)\.", line):
            moves.append((_REGISTER.findall(written[1]), _REGISTER.findall(written[2])))
    changed = True
    while changed:
        changed = False
        for targets, operands in moves:
            found = set().union(*(owners[operand] for operand in operands))
            for target in targets:
                if not found <= owners[target]:
                    owners[target] |= found
                    changed = True
    return owners


def reachable(code: Code, starts: Iterable[int], stop: Callable[[int], bool]) -> set[int]:
    """Return the instructions on ways from ``starts`` on, of each way up to the first that stops it, without that."""
    seen: set[int] = set()
    ahead = list(starts)
    while ahead:
        at = ahead.pop()
        if at not in seen and not stop(at):
            seen.add(at)
            ahead += code.after[at]
    return seen


def violations(kernel: str, ptx: str, ttir: str, names: list[str], early: bool) -> list[str]:
    """Return a line for each breach of the protocol by a serving kernel, compiled and as Triton has it before that."""
    code = read(ptx, names)
    found = _finish_violations(code, ttir) if "counters" in names and kernel == "project_kernel" else []
    return found + (_order_violations(kernel, code, "down" in names) if early else [])


def _order_violations(kernel: str, code: Code, has_down: bool) -> list[str]:
    """What is done before the wait, and when the launch after may start."""
    step = find_step(kernel, has_down)
    before = reachable(code, [0], lambda at: WAIT in code.lines[at])
    found = []
    for at in sorted(before):
        line = code.lines[at]
        if TRIGGER in line:
            found.append(f"lets the launch after start before it waits: {line}")
        if not _GLOBAL.search(line):
            continue
        writes = re.search(r"\b(st|red|atom)\.", line) is not None
        if writes or step.waits == START or code.touched[at] & set(step.needs) or not code.touched[at]:
            found.append(f"accesses {sorted(code.touched[at])} before it waits: {line}")
    triggers = [at for at, line in enumerate(code.lines) if TRIGGER in line]
    if not triggers:
        found.append("never lets the launch after start")
    if step.triggers == AT_ONCE:
        waits = [at for at, line in enumerate(code.lines) if WAIT in line]
        ahead = reachable(code, waits, lambda at: TRIGGER in code.lines[at])
        found += [f"does this before the launch after may start: {code.lines[at]}" for at in sorted(ahead)
                  if _GLOBAL.search(code.lines[at])]  # fmt: skip
    if step.waits == LATE:
        found += _idle_violations(code)
    elif any(re.match(r"ret\b", code.lines[at]) for at in before):
        found.append("has a way to its end without a wait")
    return found


def _idle_violations(code: Code) -> list[str]:
    """A program without work must be able to wait: a way with a wait but neither products nor stores."""

    def works(at: int) -> bool:
        return _MMA.search(code.lines[at]) is not None or re.search(r"\bst\.global", code.lines[at]) is not None

    idle = reachable(code, [0], works)
    waits = [at for at in idle if WAIT in code.lines[at]]
    for wait in waits:
        ends = reachable(code, [wait], works)
        if any(re.match(r"ret\b", code.lines[at]) for at in ends) and not any(TRIGGER in code.lines[at] for at in ends):
            return []
    return ["has no wait in the programs of blocks that are not in use"]


def _finish_violations(code: Code, ttir: str) -> list[str]:
    """The order of the program that adds the parts of V·x."""
    counts = [at for at, line in enumerate(code.lines) if "counters" in code.touched[at]]
    atomics = [at for at in counts if re.search(r"\b(atom|red)\.", code.lines[at])]
    found = [] if atomics else ["does not count"]
    found += [f"counts without acquire and release at the scope of the GPU: {code.lines[at]}" for at in atomics
              if not {"acq_rel", "gpu"} <= set(re.split(r"[.\s]", code.lines[at]))]  # fmt: skip
    stores = [at for at, line in enumerate(code.lines) if "parts" in code.touched[at] and re.search(r"\bst\.", line)]
    loads = [at for at, line in enumerate(code.lines) if "parts" in code.touched[at] and re.search(r"\bld\.", line)]
    if not stores or not loads:
        found.append("stores or loads no parts")
    found += [f"loads parts not from L2: {code.lines[at]}" for at in loads if ".cg" not in code.lines[at]]
    unordered = reachable(code, stores, lambda at: BARRIER in code.lines[at])
    if unordered & set(atomics):
        found.append("counts before all threads have stored: no barrier before the atomic")
    # Triton may put a barrier there for reasons of its own, so what was asked for is looked at as well
    stored, _, _ = ttir.partition("tt.atomic_rmw")
    if "gpu.barrier" not in stored[stored.rindex("tt.store") :]:
        found.append("counts without having asked for a barrier")
    uncounted = reachable(code, [0], lambda at: at in atomics)
    found += [f"loads parts before it counts: {code.lines[at]}" for at in loads if at in uncounted]
    return found
