"""Model folders and checkpoints with random damage: every command ends in a result or in one clear error.

No traceback, no hang, no memory by a number that a file states, and nothing written beside the output.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
from mutations import mutate
from quantized_sources import WAYS, Way, write_both
from tiny_models import make_model

from vllm_milo.checkpoint import CheckpointError, MiLoFormat
from vllm_milo.offline.cli import main
from vllm_milo.shards import ShardError
from vllm_milo.validation import validate_checkpoint

SECONDS = 20
MEMORY = 2 * 2**30
"""Bytes of address space that a case may take beside what the process has."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
FAST = ["--calibration", "none", "--max-rounds", "1", "--ranks", "dense=8", "--quiet"]
BUG = "a bug of milo"
"""What the command says of an exception that nothing foresaw."""


class TimeIsUp(BaseException):
    """A case ran for longer than it may."""


class Bases(NamedTuple):
    """What is damaged: a model, its checkpoint; and a text and counts of experts."""

    source: Path
    checkpoint: Path
    text: Path
    counts: Path


class Outcome(NamedTuple):
    """How a case failed, or ``good``; and all that tells it from others."""

    kind: str
    detail: str
    case: str


def make_bases(root: Path, tokens_of: Path, way: Way | None = None) -> Bases:
    """Make a model of two layers and some kB, with a tokenizer, and its checkpoint; its matrices stored in some way."""
    vocabulary = json.loads((tokens_of / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    source = make_model("qwen2_moe", root / "source", **SMALL, vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokens_of / name, source / name)
    (source / "chat.jinja").write_text("{{ messages }}")
    if way is not None:
        source = write_both(source, root / "written", way).source
    checkpoint = root / "checkpoint"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["quantize", str(source), "-o", str(checkpoint), *FAST]) == 0
    text, counts = root / "text.txt", root / "counts.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    layers = {"model.layers.1.mlp.experts": [3, 1], "model.layers.0.mlp.experts": [3, 1]}
    counts.write_text(json.dumps({"expert_counts": layers}))
    return Bases(source, checkpoint, text, counts)


def run_case(seed: int, bases: Bases, root: Path) -> Outcome:
    """Damage a copy of a base and run a command on it."""
    rng = random.Random(seed)
    place = root / f"case-{seed}"
    place.mkdir()
    (place / "outside").write_text("{}")
    is_source = rng.random() < 0.5
    folder = Path(shutil.copytree(bases.source if is_source else bases.checkpoint, place / "model"))
    if is_source and rng.random() < 0.5:
        _add_index(folder)
    if not is_source and rng.random() < 0.5:
        (folder / "milo_manifest.json").unlink()
    changes = mutate(folder, rng)
    command = _command(rng, is_source, folder, place, bases)
    out = Path(command[3]) if command[0] == "quantize" else place / "out"
    before = _snapshot(root, out)
    kind, detail = _judge(command, out)
    if kind == "good" and _snapshot(root, out) != before:
        kind, detail = "wrote outside", str(_snapshot(root, out) ^ before)
    shutil.rmtree(place)
    return Outcome(kind, detail, f"seed {seed}: {' '.join(command)} after {'; '.join(changes)}")


def _add_index(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _command(rng: random.Random, is_source: bool, folder: Path, place: Path, bases: Bases) -> list[str]:
    """Return the words of a command that fits what was damaged."""
    model, out, window = str(folder), str(place / "out"), ["--max-windows", "1", "--window", "32", "--quiet"]
    evaluate = ["eval", model, "--text", str(bases.text), *window]
    if is_source:
        changed = place / "counts"
        changed.mkdir()
        shutil.copyfile(bases.counts, changed / "counts.json")
        if rng.random() < 0.5:
            mutate(changed, rng)
        counts = ["--ranks", "frequency=8", "--expert-counts", str(changed / "counts.json")]
        several = [
            ["quantize", model, "-o", out, "--dry-run", "--json"],
            ["quantize", model, "-o", out, "--dry-run", *FAST],
            ["quantize", model, "-o", out, *FAST, *rng.choice(([], ["--ignore", r"re:.*\.o_proj"], counts))],
            ["verify", str(bases.checkpoint), "--reference", model, "--quiet"],
            [*evaluate, *rng.choice(([], ["--reference", str(bases.source)]))],
        ]
        return rng.choices(several, (3, 2, 4, 3, 1))[0]
    several = [
        ["inspect", model, "--json"],
        ["inspect", model],
        ["verify", model, "--quiet", *rng.choice(([], ["--json"]))],
        ["verify", model, "--reference", str(bases.source), "--quiet", "--json"],
        ["plugin", model],
        ["quantize", str(bases.source), "-o", model, "--overwrite", *FAST],
        [*evaluate, *rng.choice(([], ["--reference", str(bases.source)]))],
    ]
    return rng.choices(several, (3, 1, 3, 4, 3, 0.3, 1))[0]


def _judge(command: list[str], out: Path) -> tuple[str, str]:
    """Run a command within its bounds; return what is wrong with how it ended."""
    shown, said = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    try:
        with _bounds(), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
            status = _plugin(command[1]) if command[0] == "plugin" else main(command)
    except TimeIsUp:
        return "time", f"more than {SECONDS} s"
    except SystemExit as error:
        return ("good", "") if error.code == 2 else ("status", repr(error))
    except BaseException as error:
        return f"traceback {type(error).__name__}", f"{error!s:.300}{_where(error)}"
    shown.seek(0)
    return _judge_end(command, status, shown.read(), said.getvalue(), out)


def _judge_end(command: list[str], status: int, shown: str, said: str, out: Path) -> tuple[str, str]:
    errors = [line for line in said.splitlines() if line.startswith("milo ")]
    if BUG in said:
        return "unforeseen", said[-300:]
    if "out of memory" in said:
        return "memory", said[-300:]
    if "Traceback" in said and "a\\nTraceback" not in said:
        return "traceback in text", said[-300:]
    if status == 1:
        text = said[said.find("milo ") :]
        lines = [line for line in text.splitlines()[1:] if not line.startswith("  ")]
        if command[0] != "plugin" and (len(errors) != 1 or lines or len(text) > 5000 or "\0" in text):
            return "unclear", text[:600]
        if command[0] == "quantize" and "--overwrite" not in command and out.exists():
            return "left something", said[-300:]
        return "good", ""
    if status != 0 or errors:
        return "status", f"{status}: {said[-300:]}"
    if "--json" in command:
        try:
            json.loads(shown, parse_constant=_refuse_constant)
        except ValueError as error:
            return "bad JSON", str(error)
    if command[0] == "quantize" and "--dry-run" not in command:
        try:
            validate_checkpoint(Path(command[3]))
        except (CheckpointError, ShardError) as error:
            return "bad result", str(error)[:300]
    elif out.exists() and "--overwrite" not in command:
        return "wrote", "a command that writes nothing"
    return "good", ""


def _plugin(folder: str) -> int:
    """Do what the plugin does when vLLM loads a checkpoint."""
    try:
        assert (Path(folder) / "config.json").is_file()  # a pipe would be waited for
        assert (Path(folder) / "config.json").stat().st_size < 2**24
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        quantization = config["quantization_config"]
        assert isinstance(quantization, dict)
    except (OSError, ValueError, LookupError, TypeError, AssertionError, RecursionError):
        quantization = {}  # vLLM does not get as far
    for check in (lambda: MiLoFormat.from_dict(quantization), lambda: validate_checkpoint(Path(folder))):
        try:
            check()
        except (CheckpointError, ShardError) as error:
            return 1 if 0 < len(str(error)) < 5000 else 3
    return 0


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    """Bound the time, and the memory beside what the process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _time_is_up)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGALRM, handler)


def _time_is_up(*_: Any) -> NoReturn:
    raise TimeIsUp


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _snapshot(root: Path, out: Path) -> set[tuple[str, int]]:
    """Return the paths in a folder with when they were changed, but for an output."""
    paths = (path for path in root.rglob("*") if path != out and out not in path.parents)
    return {(str(path), 0 if path.is_dir() else path.lstat().st_mtime_ns) for path in paths}


def _where(error: BaseException) -> str:
    """Return the last place of our own in a traceback."""
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "vllm_milo" in name or "/offline/" in name:
            found = f" @ {Path(name).parent.name}/{Path(name).name}:{trace.tb_lineno} {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return found


@pytest.fixture(scope="module")
def bases(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"), bundled_model)


def run_cases(seeds: range, bases: Bases, root: Path) -> None:
    failed = [outcome for seed in seeds if (outcome := run_case(seed, bases, root)).kind != "good"]
    counts = Counter(outcome.kind for outcome in failed)
    assert not failed, f"{len(failed)} of {len(seeds)} failed: {dict(counts)}\n" + "\n".join(map(str, failed[:20]))


def test_what_nothing_foresaw_is_found(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command says it in one line, which counts as a failure here."""

    def fail(*_: Any) -> NoReturn:
        raise KeyError("a\nb")

    monkeypatch.setattr("vllm_milo.offline.cli.inspect.inspect_checkpoint", fail)
    assert _judge(["inspect", str(bases.checkpoint)], tmp_path / "out")[0] == "unforeseen"
    monkeypatch.setenv("MILO_TRACEBACK", "1")
    assert _judge(["inspect", str(bases.checkpoint)], tmp_path / "out")[0] == "traceback KeyError"


def test_damaged_folders(bases: Bases, tmp_path: Path):
    run_cases(range(500), bases, tmp_path)


@pytest.mark.parametrize("way", ["fp8 blocks", "packed int4 groups with zero points"])
def test_damaged_folders_of_models_in_other_formats(
    way: str, bundled_model: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    bases = make_bases(tmp_path_factory.mktemp("bases"), bundled_model, WAYS[way])
    run_cases(range(100), bases, tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_more_damaged_folders(bases: Bases, tmp_path: Path):
    run_cases(range(1000, 11_000), bases, tmp_path)
