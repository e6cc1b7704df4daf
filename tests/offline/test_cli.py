"""The milo command: quantize, inspect, eval, stats on the bundled model, and its errors."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import TEXT

from vllm_milo.offline.cli import main, summary
from vllm_milo.offline.cli.summary import serve_lines


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> dict[str, Path]:
    """The bundled model by every method."""
    root = tmp_path_factory.mktemp("methods")
    compensated = ["--ranks", "dense=16,kurtosis=8", "--max-rounds", "6"]
    for method, options in (("rtn", []), ("hqq", []), ("paper", compensated)):
        arguments = ["quantize", str(bundled_model), "-o", str(root / method), "--method", method, "--quiet", *options]
        assert main(arguments) == 0
    return {method: root / method for method in ("rtn", "hqq", "paper")}


def eval_json(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    capsys.readouterr()
    assert main(["eval", str(folder), "--text", str(TEXT), "--json", "--quiet", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_methods_are_ordered(quantized: dict[str, Path], bundled_model: Path, capsys: pytest.CaptureFixture[str]):
    folders = [bundled_model, quantized["paper"], quantized["hqq"], quantized["rtn"]]
    found = [eval_json(folder, capsys, "--max-windows", "12")["perplexity"] for folder in folders]
    assert found == sorted(found)
    assert found[0] < 30  # the trained model; its unigram perplexity is 915
    assert found[1] - found[0] < 0.7 * (found[2] - found[0])


def test_eval_states_its_protocol(small_model: Path, capsys: pytest.CaptureFixture[str]):
    result = eval_json(small_model, capsys, "--max-windows", "2")
    assert result["protocol"].startswith("window 512, stride 512")
    assert result["windows"] == 2
    assert result["tokens"] == 1024
    assert main(["eval", str(small_model), "--text", str(TEXT), "--max-windows", "1", "--quiet"]) == 0
    assert "protocol: window 512" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "dense=8", "--method", "hqq"], "--ranks needs compensators, which --method hqq has not"),
        (["--ranks", "nonsense=8"], "unknown policy 'nonsense'"),
        (["--max-rounds", "0"], "--max-rounds must be at least 1"),
        (["--calibration-windows", "0"], "--calibration-windows must be at least 1"),
        (["--calibration", "/nowhere.txt"], "/nowhere.txt: cannot be read as UTF-8 text"),
        (["--device", "cuda:7"], "torch sees no CUDA device" if not torch.cuda.is_available() else "cuda"),
        (["--ranks", "frequency=8", "--calibration", "none"], "needs --expert-counts"),
        (["--expert-counts", "/nowhere.json"], "/nowhere.json: no such file; make it with `milo stats"),
        (["--ranks", ""], "--ranks: is empty; name a policy"),
        (["--ranks", " , "], "--ranks: is empty; name a policy"),
        *((["--budget-bits", bits], f"--budget-bits {bits}: must be a number") for bits in ("nan", "inf", "-1", "0")),
        *((["--seed", seed], f"--seed {seed}: must be a number from 0") for seed in ("-1", str(2**40), str(2**70))),
        (["--device-memory", "1e300"], "--device-memory 1e+300: must be a number of GiB above 0"),
        *(([f"--{name}", str(10**20)], f"--{name} must be at most") for name in ("calibration-windows", "max-rounds")),
        (
            ["--ignore", "lm_hea"],
            "look like 'model.layers.0.mlp.shared_expert.down_proj' or 'model.layers.0.mlp.experts'",
        ),
        (["--device", "mps"], "--device mps: nothing of milo runs on it"),
        (["--ignore", "re:("], "--ignore 're:(': 're:(' is not a regular expression"),
    ],
)
def test_errors_go_to_stderr(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options, message):
    if "cuda:7" in options and torch.cuda.is_available():
        pytest.skip("a GPU may be there")
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), "--quiet", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("milo quantize: error: ")
    assert message in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "m", "-o", "out", "--preset", "balnced"], "argument --preset: invalid choice: 'balnced' (choose"),
        (["quantize", "m"], "the following arguments are required: -o/--output"),
        (["quantise", "m"], "argument command: invalid choice: 'quantise' (choose"),
    ],
)
def test_a_command_line_that_is_wrong_is_answered_in_a_line(words: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = "milo quantize" if words[0] == "quantize" else "milo"
    assert line.startswith(f"{name}: error: {message}")
    assert line.endswith(f"; `{name} --help` tells all")


@pytest.mark.parametrize(("vllm", "package", "lines"), [(True, True, 1), (True, False, 2), (False, False, 1)])
def test_how_to_serve_with_the_cpu_build_is_said_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, vllm: bool, package: bool, lines: int
):
    monkeypatch.setattr(summary, "find_spec", lambda _: object() if vllm else None)
    monkeypatch.setattr(summary, "distributions", lambda name: iter([name] if package else []))
    said = serve_lines(Path("a b")).splitlines()
    assert said[0] == "serve it: vllm serve 'a b' --quantization milo"
    module = "python -m vllm.entrypoints.openai.api_server --model 'a b' --quantization milo"
    assert said[1:] == [f"with vLLM's CPU build, as here: {module}"][: lines - 1]


def test_text_that_cannot_be_read(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(small_model), "--text", str(tmp_path / "none.txt"), "--quiet"]) == 1
    assert "none.txt: cannot be read as UTF-8 text" in capsys.readouterr().err


def test_a_calibration_file(small_model: Path, tmp_path: Path):
    """Plain text and .jsonl of documents and chats; what is used of it is in the checkpoint's recipe."""
    lines = [{"text": TEXT.read_text(encoding="utf-8")[:6000]}, {"messages": [{"role": "user", "content": "Hello."}]}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    for text in (TEXT, chats):
        out = tmp_path / text.stem
        options = ["--calibration", str(text), "--calibration-windows", "2", "--learn-steps", "1", "--max-rounds", "1"]
        assert main(["quantize", str(small_model), "-o", str(out), "--ranks", "dense=8", "--quiet", *options]) == 0
        recipe = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]["recipe"]
        assert recipe["calibration"] == str(text)
        assert 0 < recipe["calibration_tokens"] <= 1024
        assert recipe["learn_steps"] == 1
        report = json.loads((out / "milo_report.json").read_text(encoding="utf-8"))
        assert len(report["layers"]) == 2
        assert len(report["matrices"]) == 38


def test_summary(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    options = ["--ranks", "dense=1000", "--max-rounds", "1", "--calibration", "none"]
    assert main(["quantize", str(small_model), "-o", str(out), *options]) == 0
    captured = capsys.readouterr()
    for part in ("38 matrices in", "MiB", "bits a weight", "peak", "GiB of host memory"):
        assert part in captured.out
    assert "min(N, K)" in captured.err
    assert "layer" in captured.err  # the progress bar


def test_counts_that_no_policy_asks_for(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    counts = tmp_path / "counts.json"
    assert main(["stats", str(small_model), "--text", str(TEXT), "--max-windows", "1", "-o", str(counts)]) == 0
    options = ["--calibration", "none", "--expert-counts", str(counts)]
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), "--quiet", *options]) == 1
    assert "--expert-counts is for --ranks frequency=R alone" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--ranks", "uniform=8"]])
def test_a_budget_that_is_not_spent(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more):
    options = ["--calibration", "none", "--budget-bits", "100", "--dry-run", "--json", *more]
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), *options]) == 0
    captured = capsys.readouterr()
    bits = json.loads(captured.out)["bits_per_weight"]
    assert f"warning: --budget-bits 100: {bits:.3f} bits a weight are stored, all ranks are as large" in captured.err


INTERRUPTED_AGAIN = """
import atexit, os, signal, sys
from vllm_milo.offline.cli import command

def interrupted(arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have had it ignored
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    raise KeyboardInterrupt

command.hub.run = interrupted
sys.exit(command.main())
"""


def test_another_interrupt_while_the_command_ends():
    command = [sys.executable, "-c", INTERRUPTED_AGAIN, "families"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == "milo families: interrupted; nothing was left behind\n"
    assert done.returncode == 130


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_options_are_read(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("vllm_milo.offline.cli.families.add_parser", lambda _: signal.raise_signal(number))
    try:
        assert main(["families"]) == status
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert capsys.readouterr().err == "milo: interrupted; nothing was left behind\n"


def test_called_from_python_it_leaves_the_handlers_as_they_were(capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["families"]) == 0
    assert main(["inspect", "no such folder"]) == 1
    assert "config.json: no such file; there is no folder no such folder\n" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["families"]).result() == 0


def test_an_interrupt_while_the_libraries_are_loaded():
    """Which takes seconds, in which there are no options yet."""
    script = """
import importlib.abc, sys
class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from vllm_milo.command import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "milo: interrupted; nothing was left behind\n")


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", ""],
        ["verify", "MODEL", "--reference", ""],
        ["quantize", "", "-o", "out"],
        ["quantize", "MODEL", "-o", "out", "--log-json", ""],
        ["quantize", "MODEL", "-o", "out", "--expert-counts", ""],
        ["quantize", "MODEL", "-o", "out", "--devices", "cpu,"],
        ["eval", "MODEL", "--text", ""],
        ["stats", "MODEL", "--text", "text", "-o", ""],
        ["import", "MODEL", "-o", ""],
        ["export", "MODEL", "--format", "compressed-tensors", "-o", " "],
    ],
)
def test_an_empty_argument_is_not_the_working_directory(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(words)
    assert "is empty; is a shell variable unset?" in capsys.readouterr().err


def test_what_may_not_be_looked_at_is_no_bug(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("vllm_milo.offline.cli.inspect.inspect_checkpoint", refuse)
    assert main(["inspect", str(checkpoint)]) == 1
    said = f"milo inspect: error: {checkpoint}: Permission denied; ask who owns it, or name another\n"
    assert capsys.readouterr().err == said


def run_in_a_shell(script: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """Run a script of the shell in which ``milo`` is the command, and ``$1`` the first of the arguments."""
    milo = f'set -o pipefail; milo() {{ "{sys.executable}" -m {main.__module__.rpartition(".")[0]} "$@"; }}; '
    command = ["bash", "-c", milo + script, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_output_that_nobody_reads():
    done = run_in_a_shell("milo families | true")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", ["families", 'inspect "$1" --json'])
def test_an_output_without_room(checkpoint: Path, command: str):
    done = run_in_a_shell(f"milo {command} >/dev/full", checkpoint)
    assert done.returncode == 1
    assert done.stderr == f"milo {command.split()[0]}: error: what it prints finds no room: No space left on device\n"


def test_best_without_a_text_says_so(small_model: Path, tmp_path: Path, capsys):
    options = ["--preset", "best", "--calibration", "none", "--max-rounds", "1", "--device", "cpu"]
    assert main(["quantize", str(small_model), "-o", str(tmp_path / "out"), *options]) == 0
    assert "warning: --preset best learns from a text; without one it learns nothing" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [">/dev/full", "| true", ">&-", "2>&-"])
def test_a_conversion_is_not_lost_for_its_output(small_model: Path, tmp_path: Path, closed: str):
    out = tmp_path / "out"
    done = run_in_a_shell(f'milo quantize "$1" -o "$2" --method rtn --quiet {closed}', small_model, out)
    assert done.returncode == 0
    assert ("warning: the summary cannot be printed" in done.stderr) == (closed in (">/dev/full", "| true"))
    assert len(done.stderr.splitlines()) <= 1
    assert main(["verify", str(out)]) == 0
