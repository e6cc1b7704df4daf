"""The repository itself: packaging, import rules, and the README's commands."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path

import pytest
from hub_server import HubServer, of_folder
from readme import PAGES, ROOT, readme_commands
from scripts import python

from vllm_milo.offline.cli import main as milo


def test_repository_root_does_not_pose_as_the_kernels_package():
    """`kernels` is Hugging Face's package, which transformers probes for by name."""
    code = (
        "from transformers.utils.import_utils import is_kernels_available\n"
        "from transformers import MixtralConfig, MixtralForCausalLM\n"
        "assert not is_kernels_available()\n"
        "MixtralForCausalLM(MixtralConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=64, vocab_size=64))\n"
    )
    python("-c", code, cwd=ROOT)


def test_wheel_holds_the_mapped_packages(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vllm_milo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert {name for name in tops if not name.endswith(".dist-info")} == {"vllm_milo"}
        held = {name.rpartition("/")[0] for name in archive.namelist() if name.endswith(".py")}
        assert held == {module_folder(path) for path in modules().values()}
        archive.extractall(tmp_path / "site")
    code = (
        "import vllm_milo.kernels.ops, vllm_milo.offline.cli, vllm_milo.kernels.serving.layout as layout\n"
        "print(layout.__file__)"
    )
    found = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()[-1]
    assert found.startswith(str(tmp_path / "site"))


PURE = ("checkpoint", "dtypes", "head", "head.layout", "names", "patterns", "shards", "validation", "values", "version")
"""Modules of the plugin that need neither torch nor vLLM, and that the converter may import too."""

FLOORS = {
    "errors": set(),
    "threads": set(),
    "progress": {"errors"},
    "nouns": set(),
    "durable": {"errors"},
    "solve": {"errors", "nouns"},
    "families": {"errors", "nouns"},
    "source": {"errors", "nouns", "families"},
    "hub_names": set(),
    "calibration": {"errors", "nouns", "progress", "families", "source", "hub_names"},
    "effort": {"source", "calibration"},
    "batches": {"nouns", "source", "calibration"},
    "learn": {"nouns", "progress", "solve", "families", "source"},
    "served": {"nouns", "source"},
    "ranks": {"errors", "nouns", "progress", "source", "served"},
    "presets": {"errors", "nouns", "ranks"},
    "checkpoint": {"errors", "nouns", "durable", "solve", "families", "source", "served", "hub_names"},
    "importing": {"errors", "progress", "families", "source", "checkpoint"},
    "exporting": {"errors", "progress", "durable", "families", "checkpoint"},
    "evaluation": {"errors", "progress", "durable", "families", "source", "checkpoint"},
    "spread": {"errors", "nouns", "solve", "source", "calibration", "batches", "checkpoint"},
    "conversion": {"nouns", "learn", "ranks", "checkpoint"},
    "fingerprint": {"errors", "durable", "source", "hub_names", "conversion"},
    "steps": {"nouns", "durable", "solve", "source", "checkpoint"},
    "bench": {"nouns", "progress", "source", "calibration", "batches", "learn", "checkpoint", "spread"},
    "along": {"nouns", "progress", "solve", "source", "calibration", "batches", "learn", "served", "ranks"}
    | {"checkpoint", "spread", "conversion", "steps", "bench"},
    "planning": {
        "errors",
        "nouns",
        "families",
        "source",
        "calibration",
        "batches",
        "served",
        "ranks",
        "checkpoint",
        "conversion",
    },
    "hub": {"errors", "durable", "hub_names", "planning"},
    "convert": {"errors", "nouns", "progress", "source", "calibration", "batches", "ranks"}
    | {"checkpoint", "conversion", "fingerprint", "steps", "bench", "along", "planning", "spread"},
    "cli": {
        "errors",
        "nouns",
        "families",
        "source",
        "calibration",
        "learn",
        "ranks",
        "presets",
        "checkpoint",
        "evaluation",
    }
    | {
        "conversion",
        "planning",
        "convert",
        "importing",
        "exporting",
        "hub_names",
        "hub",
        "progress",
        "threads",
        "effort",
    },
}
"""The rooms of offline/, each with those that it may import: only what stands above it in this list."""


def room(path: Path) -> str:
    """The package of offline/, or its module at the top, that a file belongs to."""
    return path.relative_to(ROOT / "offline").parts[0].removesuffix(".py")


def test_rooms_of_the_converter_import_downwards():
    above: set[str] = set()
    for name, allowed in FLOORS.items():
        assert allowed <= above, f"{name} may import {sorted(allowed - above)}, which stand below it"
        above.add(name)
    prefix = "vllm_milo.offline"
    for path in (ROOT / "offline").rglob("*.py"):
        if path == ROOT / "offline" / "__init__.py":
            continue
        used = {name.removeprefix(prefix).strip(".").split(".")[0] for name in imports(path) if name.startswith(prefix)}
        extra = used - FLOORS[room(path)] - {room(path)}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}, which {room(path)} may not"


def modules() -> dict[str, Path]:
    """All modules of the packages by the name they are installed by."""
    found = {}
    for folder in ("vllm_milo", "kernels", "offline"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "vllm_milo" else ("vllm_milo", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def module_folder(path: Path) -> str:
    """The folder that a module is installed in."""
    folder = path.relative_to(ROOT).parent
    return (folder if folder.parts[0] == "vllm_milo" else Path("vllm_milo") / folder).as_posix()


def test_no_module_imports_itself_in_a_circle():
    """Imports count at the top of modules and inside functions alike."""
    known = modules()
    graph = {name: imports(path, known) & known.keys() for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for used in graph[name] - {name}:
                visit(used, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_folders_hold_few_modules():
    for folder in {path.parent for path in (*modules().values(), *(ROOT / "benchmarks").rglob("*.py"))}:
        held = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(held) <= 12, f"{folder.relative_to(ROOT)} holds {len(held)} modules"


def imports(path: Path, known: Collection[str] = ()) -> set[str]:
    """Absolute names of all modules that a file imports, wherever it does.

    Modules that are ``known`` and taken from a package count in its place.
    """
    package = "vllm_milo." + ".".join(path.relative_to(ROOT).parent.parts)
    package = "vllm_milo" if path.parent == ROOT / "vllm_milo" else package
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else None
            name = ".".join(filter(None, (parent, node.module))) if node.level else str(node.module)
            members = {f"{name}.{alias.name}" for alias in node.names}
            found |= (members & set(known)) or {name}
    return found


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("kernels", {"torch", "triton", "vllm_milo.kernels"}),
        (
            "offline",
            {"torch", "safetensors", "tqdm", "transformers", "vllm_milo.offline"}
            | {"vllm_milo.kernels.packing", "vllm_milo.kernels.integers"}
            | {"vllm_milo.kernels.resident"}  # what a rank costs once it is loaded
            | {"vllm_milo", *(f"vllm_milo.{name}" for name in PURE)}
            | {"jinja2"}  # of chat templates; torch and transformers bring it
            | {"huggingface_hub"}  # model cards; download and upload only where a model of the Hub is named
            | {"datasets"}  # of the Hub; only where a dataset is asked for
            | {
                f"vllm_milo.kernels.convert{name}" for name in ("", ".feedback", ".learn", ".learn_factors")
            },  # the converter's kernels
        ),
    ],
)
def test_packages_import_in_one_direction(folder: str, allowed: set[str]):
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names:
                continue
            nested = any(name.startswith(f"{package}.") for package in ("vllm_milo.kernels", "vllm_milo.offline"))
            inside = f"vllm_milo.{folder}"
            known = name in allowed or top in allowed - {"vllm_milo"} or (nested and name.startswith(inside))
            assert known, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("name", ["__init__", *PURE])
def test_pure_modules_need_nothing(name: str):
    code = (
        f"import sys; import vllm_milo.{name}; print({{'torch', 'vllm', 'triton', 'transformers'}} & set(sys.modules))"
    )
    assert python("-c", code.replace(".__init__", ""), cwd=ROOT.parent).strip() == "set()"


def test_only_the_plugin_imports_vllm():
    plugin = ROOT / "vllm_milo"
    users = {
        path.relative_to(plugin).as_posix()
        for path in plugin.rglob("*.py")
        if any(name.split(".")[0] == "vllm" for name in imports(path))
    }
    known = {"config.py", "linear.py", "fused_moe.py", "compat.py", "online/methods.py"}
    assert (
        users == (known | {"models/nameless.py", "models/completeness.py", "models/gates.py", "head/method.py"}) & users
    )
    assert {"config.py", "compat.py"} <= users


IN_CI = {"make demo", "make test", "make lint", "make test-slow"}


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Path):
    """Every `milo` command of the README and of docs/ runs as it stands, from a folder that looks like the repository
    but for the size of its model.

    The first runs as a user's does, from a Hub; the others, in this process, need not import torch again.
    """
    assets = ROOT / "tests" / "assets"
    (tmp_path / "tests" / "assets").mkdir(parents=True)
    for path in assets.iterdir():
        (tmp_path / path.relative_to(ROOT)).symlink_to(small_model if path.is_dir() else path)
    monkeypatch.chdir(tmp_path)
    first, *others = [shlex.split(command)[1:] for command in readme_commands() if command.startswith("milo ")]
    hub = HubServer()
    hub.repositories[first[1]] = of_folder(small_model)
    variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    try:
        python("-m", "vllm_milo.offline.cli", *first, cwd=tmp_path, TRITON_INTERPRET="0", **variables)
    finally:
        hub.shutdown()
        hub.server_close()
    for words in others:
        assert milo(words) == 0, words


def test_pages_link_to_what_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_readme_command_is_known():
    for command in readme_commands():
        # milo: above; vllm and curl: test_vllm_server; lm_eval: benchmarks/test_lm_eval, which takes it from the page
        lm_eval = 'python -c "import vllm_milo; from lm_eval'
        known = command in IN_CI or command.startswith(("milo ", "vllm serve ", "curl ", lm_eval))
        assert known, f"the README's command {command!r} is run by no test"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in IN_CI:  # of the slow tests, those that are not long
        assert any(line == command or line.startswith(f"{command} SELECT=") for line in script), command


def test_bundled_model_is_small():
    files = (ROOT / "tests" / "assets").rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 8 * 2**20


def test_files_stay_small():
    """One concern a file."""
    for folder in ("vllm_milo", "kernels", "offline", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
