"""The package's folders: how many modules each holds, and that each is installed."""

from __future__ import annotations

import tomllib

from readme import ROOT

MOST_MODULES = 12


def test_rooms_stay_small():
    for folder in {path.parent for path in (ROOT / "kernels").rglob("*.py")}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, folder


def test_every_room_is_installed():
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "kernels").rglob("__init__.py")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    listed = {name for name in settings["packages"] if name.startswith("vllm_milo.kernels")}
    assert listed == {".".join(("vllm_milo", *folder.parts)) for folder in found}
