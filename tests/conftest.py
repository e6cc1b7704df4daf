"""Shared fixtures. Without a GPU, Triton kernels run in its interpreter, which must be chosen before import."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# before torch: the models are too small for threads, which wait for each other longer than they compute,
# above all where two test processes and vLLM share two cores
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)  # where something has imported it before
# for the benchmarks; last, so that vllm_milo is the installed one
sys.path.append(str(Path(__file__).resolve().parent.parent))

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import quick_interpreter
from tiny_models import FAMILIES, ODD, TEXT, cut_model, expert_counts, make_model
from transformers import AutoConfig
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies
from vllm_milo.offline.source.tokens import read_tokens

if not HAS_GPU:
    quick_interpreter.quicken()

ASSETS = Path(__file__).parent / "assets"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


SHARING = ("test_vllm_models.py", "test_vllm_server.py")
"""Files whose tests share what takes long to make: a server, vLLM's output."""
SHARING_BY_NAME = ("families/test_conversion.py",)
"""Files in which those with the same parameters do: the conversion of a family."""


class Scheduling(LoadScopeScheduling):
    """Gives single tests to whoever is free, but to one process those that share something; these first."""

    def _split_scope(self, nodeid: str) -> str:
        path = Path(nodeid.partition("::")[0])
        if path.name in SHARING:
            return path.name
        if f"{path.parent.name}/{path.name}" in SHARING_BY_NAME:
            return f"{path}{nodeid[nodeid.find('[') :]}" if "[" in nodeid else nodeid
        if HAS_GPU and path.name.startswith("test_vllm_"):
            return nodeid  # they start vLLM themselves, and a GPU has room for several
        return "plugin" if path.parent.name == "plugin" else nodeid  # one import of vLLM


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Schedule ``pytest -n 2``; other ways of ``--dist`` are left alone."""
    return Scheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The bundled trained model."""
    return ASSETS / "tiny-qwen2-moe"


@pytest.fixture(scope="session")
def small_model(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the bundled model's layers with a third of their experts, and its tokenizer: for what takes long with
    each matrix and needs a text, but no answers that make sense; not to be changed.
    """
    return cut_model(bundled_model, tmp_path_factory.mktemp("small") / "model", layers=2, experts=4)


@pytest.fixture(scope="session")
def trained_model(bundled_model: Path) -> torch.nn.Module:
    """The bundled model, loaded; who changes it changes it back."""
    return load_model(bundled_model)


@pytest.fixture(scope="session")
def trained_tokens(bundled_model: Path) -> torch.Tensor:
    """A text in the bundled model's tokens."""
    return read_tokens(bundled_model, TEXT)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of every family; not to be changed."""
    root = tmp_path_factory.mktemp("sources")
    return {family: make_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE whose hidden size groups of 128 do not divide; not to be changed."""
    return make_model("qwen2_moe", tmp_path_factory.mktemp("odd") / "model", **ODD)


@pytest.fixture
def source(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A Mixtral of its own, to be broken."""
    return Path(shutil.copytree(sources["mixtral"], tmp_path / "source"))


@pytest.fixture(scope="session")
def checkpoint(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiLo checkpoint of the Qwen2-MoE, with ranks 16 (dense) and 8."""
    conversion = Conversion(Recipe(max_rounds=1), parse_policies("dense=16,sparse=8"))
    return convert(sources["qwen2_moe"], tmp_path_factory.mktemp("done") / "milo", conversion, progress=False).out


# group size and factor bits vary over the families, so that each combination is served at least once
CHECKPOINT_FORMATS = {
    "mixtral": (64, 3),
    "qwen2_moe": (32, 8),
    "qwen3_moe": (128, 3),
    "olmoe": (64, 16),
    "odd": (128, 3),  # a mixture of groups of 64 and 128
    "bundled": (64, 3),
}


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, bundled_model: Path, odd_model: Path, sources: dict[str, Path]
) -> dict[str, Path]:
    """A MiLo checkpoint of every family, with ragged expert ranks, of the odd and of the bundled model."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {**sources, "odd": odd_model, "bundled": bundled_model}
    folders = {}
    for name, (group_size, bits) in CHECKPOINT_FORMATS.items():
        source = models[name]
        counts = expert_counts(AutoConfig.from_pretrained(source))
        conversion = Conversion(
            recipe=Recipe(group_size=group_size, factor_bits=bits, max_rounds=2),
            policies=parse_policies("dense=16,frequency=16"),
            expert_counts=counts,
        )
        folders[name] = convert(source, root / name, conversion, progress=False).out
    return folders


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """The device that Triton kernels run on: cpu stands for the interpreter."""
    if request.param == "interpreter" and HAS_GPU:
        pytest.skip("the interpreter is chosen per process; this one has a GPU")
    return "cpu" if request.param == "interpreter" else "cuda"


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.empty return NaN (or a huge integer), so that what nothing writes shows."""
    real_empty, real_empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(real_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(real_empty_like(*args, **kwargs)))
