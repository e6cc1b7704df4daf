"""The runs behind the tables are commands that exist, with options that exist."""

import argparse
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import TINY

ROOT = Path(__file__).parents[2]
RUNS = {
    "benchmarks.divergence": 2,
    "benchmarks.roles_alone": 4,
    "tests/wide_families.py": 2,
    "tests/served_families.py": 2,
    "benchmarks.kernels.moe_layer": 1,
    "benchmarks.kernels.linear": 1,
    "benchmarks.kernels.wide": 1,
    "benchmarks.serving.decode": 2,
    "benchmarks.serving.traffic": 2,
    "benchmarks.serving.load": 2,
    "benchmarks.serving.soak": 4,
    "benchmarks.accuracy.at_load.run": 2,
}


class Parsed(Exception):
    """The command line was understood."""


@pytest.fixture(scope="module")
def commands() -> dict[str, list[list[str]]]:
    """What make would run, by module or script."""
    options = ["MODELS=out/first out/second", "TEXTS=docs.txt code.txt", "OUT=out/tables"]
    options += ["ROLES=q routed-down", "FAMILIES=jamba hy_v4"]
    make = ["make", "--dry-run", "-f", "benchmarks/tables.mk", "PYTHON=python", *options, "accuracy", "speed"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    found: dict[str, list[list[str]]] = {}
    for command in re.findall(r"timeout \d+ python (?:-m )?(.*?) > \S+/log", printed):
        name, *words = shlex.split(command)
        found.setdefault(name, []).append(words)
    return found


def test_all_runs_are_there(commands: dict[str, list[list[str]]]):
    assert {name: len(runs) for name, runs in commands.items()} == RUNS
    assert {tuple(words[:1]) for words in commands["benchmarks.divergence"]} == {("out/first",), ("out/second",)}
    assert {words[-1] for words in commands["benchmarks.roles_alone"]} == {"q", "routed-down"}


def test_families_are_known():
    defaults = re.search(r"^FAMILIES \?= (.*)$", (ROOT / "benchmarks/tables.mk").read_text(), re.MULTILINE)
    assert defaults is not None
    assert set(defaults[1].split()) <= set(TINY)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "tests/served_families.py"])
def test_options_are_understood(name: str, commands: dict[str, list[list[str]]], monkeypatch: pytest.MonkeyPatch):
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments):
        real(self, *arguments)
        raise Parsed

    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(name)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    for words in commands[name]:
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(Parsed):
            module.main()
