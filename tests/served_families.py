"""Serves tiny checkpoints of the families with vLLM, and prints how far their log-probabilities are from what they must
be: ``python tests/served_families.py [FAMILY...]``.

Four models a family, each by vLLM: the checkpoint of the default, which learns along a text where transformers has the
family; one with rank 16 on every matrix; and what each stands for, unquantized. The last is the control too: how far
vLLM's own arithmetic is from transformers'.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import hand_made
import torch
import vllm_runner
from tiny_families import (
    TINY,
    fuse_as_published,
    has_class,
    has_idle_experts,
    learns,
    make_family,
    publish,
    with_idle_experts,
)
from tiny_models import VOCABULARY, compare, make_prompts
from vllm_jobs import DEVICE, DTYPE, job

from vllm_milo.offline.conversion import Conversion, Text
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.learn.layer import LearnOptions
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies

TEXT = torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
KINDS = ("default", "rank 16")


class Difference(NamedTuple):
    """Mean and largest difference of prompt log-probabilities, in nats."""

    mean: float
    worst: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Difference:
        held = list(values)
        assert len(held) == 1 + 16 + 63 + 128 + 299
        return cls(sum(held) / len(held), max(held))

    def __str__(self) -> str:
        return f"{self.mean:.1e} ({self.worst:.1e})"


def make(name: str, root: Path, kinds: Iterable[str] = KINDS) -> dict[str, Path]:
    """Convert a tiny model; returns the checkpoints by kind, and the unquantized models as ``… plain``."""
    source, folders = make_family(name, root / "source"), {}
    for kind in kinds:
        folders[kind] = convert(source, root / kind, _conversion(name, kind), progress=False).out
        folders[f"{kind} plain"] = _plain(name, source, folders[kind], root / f"{kind} plain")
    return folders


def _conversion(name: str, kind: str) -> Conversion:
    if kind == "rank 16":
        return Conversion(Recipe(max_rounds=1), parse_policies("uniform=16"))
    text = Text("random", TEXT, LearnOptions(steps=1, batch=2)) if learns(name) else None
    recipe = Recipe(max_rounds=1, feedback_rounds=1, group_size=128)
    return Conversion(recipe if text else Recipe(max_rounds=1, group_size=128, base="hqq"), budget_bits=4.0, text=text)


def _plain(name: str, source: Path, checkpoint: Path, out: Path) -> Path:
    """Save what a checkpoint stands for, in float32 and in the layout of its source."""
    if not has_class(name):
        return fuse_as_published(name, source, hand_made.dequantized(checkpoint, out))
    load_model(checkpoint).save_pretrained(out)
    publish(name, out)
    return hand_made.copy_settings(source, out, {"dtype": "float32"})


def reference(name: str, folders: dict[str, Path], kind: str) -> Path | None:
    """Return the folder of what a checkpoint stands for that transformers runs, or None where its class does not."""
    if has_class(name):
        return folders[kind]
    plain = folders[f"{kind} plain"]
    return with_idle_experts(name, plain, plain.with_name(f"{kind} idle")) if has_idle_experts(name) else None


def serve(families: dict[str, dict[str, Path]], folder: Path, mend_router: bool = True) -> dict[str, dict[str, Any]]:
    """Return vLLM's outputs by family and kind; families that need other options of vLLM get a process of their own."""
    outputs: dict[str, dict[str, Any]] = {}
    for dtype, is_part in sorted({_needs(name) for name in families}):
        models = {
            f"{name}/{kind}": path
            for name, made in families.items()
            if _needs(name) == (dtype, is_part)
            for kind, path in made.items()
            if TINY[name].unquantized or kind in KINDS
        }
        place = folder / f"{dtype} {is_part}"
        place.mkdir(parents=True)
        todo = job(models, dtype=dtype, **ENGINE, language_model_only=is_part) | {"mend_router": mend_router}
        for key, output in vllm_runner.run(todo, place, timeout=3000).items():
            name, kind = key.split("/")
            outputs.setdefault(name, {})[kind] = output
    return outputs


def _needs(name: str) -> tuple[str, bool]:
    """Return what vLLM computes a family in, and whether it is the text model within a larger one."""
    return TINY[name].dtype if DEVICE == "cpu" else DTYPE, bool(TINY[name].around)


ENGINE = {
    "trust_remote_code": True,
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},  # vLLM's for CPUs turns one head of latent ones
    "enable_prefix_caching": False,  # Mamba's operator for CPUs keeps no states in between
}


def between(mine: list[dict], theirs: list[dict]) -> Difference:
    """Return the difference of two outputs of vLLM."""
    return Difference.of(
        abs(one - other)
        for outputs in zip(mine, theirs, strict=True)
        for one, other in zip(*(output["prompt_logprobs"] for output in outputs), strict=True)
    )


def against_transformers(folder: Path, outputs: list[dict]) -> Difference:
    """Return the difference of an output of vLLM from the model of a folder, in float32."""
    return Difference.of(compare(load_model(folder), make_prompts(folder), outputs).differences)


def rows(families: dict[str, dict[str, Path]], outputs: dict[str, dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    """Yield a row of the table for each family: its name, each kind's difference, and the control."""
    for name, made in families.items():
        found = outputs[name]
        if not TINY[name].unquantized:
            yield (
                name,
                *(_beside_transformers(made[kind], found[kind]) for kind in KINDS),
                "not served, so of the others",
            )
            continue
        cells = [_cell(found, kind, f"{kind} plain") for kind in KINDS]
        yield name, *cells, _control(name, made, found)


def _control(name: str, made: dict[str, Path], found: dict[str, Any]) -> str:
    plain = f"{KINDS[-1]} plain"
    if "error" in found[plain]:
        return found[plain]["error"]
    folder = reference(name, made, KINDS[-1])
    return "no class" if folder is None else str(against_transformers(folder, found[plain]))


def _beside_transformers(folder: Path, found: Any) -> str:
    return found["error"] if "error" in found else str(against_transformers(folder, found))


def _cell(found: dict[str, Any], mine: str, theirs: str) -> str:
    errors = [found[kind]["error"] for kind in (mine, theirs) if "error" in found[kind]]
    return errors[0] if errors else str(between(found[mine], found[theirs]))


def main() -> None:
    """Print the table of the families named on the command line, or of all."""
    print("| model_type | default | rank 16 | vLLM and transformers, unquantized |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        families = {name: make(name, Path(folder) / name) for name in sys.argv[1:] or TINY}
        for row in rows(families, serve(families, Path(folder) / "outputs")):
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
