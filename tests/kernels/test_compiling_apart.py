"""Compiling in other processes, which threads of this one ask for it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fake_kernels
import pytest
import torch
import triton
from scripts import run_script

from vllm_milo.kernels.compiling import helpers
from vllm_milo.kernels.compiling.helpers import Helper
from vllm_milo.kernels.compiling.jobs import TargetDriver, job_of
from vllm_milo.kernels.compiling.threads import Compiler, Share
from vllm_milo.kernels.launch import Launch, Pointer
from vllm_milo.kernels.serving.reduce import _sum_splits_kernel
from vllm_milo.kernels.warm_up import wait

CPU = torch.device("cpu")


def test_what_another_process_compiles_is_found_in_the_cache(tmp_path: Path):
    """With Triton as on a GPU: both must work out the same keys of the cache."""
    found = json.loads(run_script("compile_apart.py", cache=tmp_path))
    assert found["launches"] >= 15
    assert (found["loaded"], found["compiled"]) == (found["launches"], 0)
    assert len(list(tmp_path.rglob("*.cubin"))) == found["launches"]
    assert found["helpers"] >= 1
    assert found["left"] == 0, "processes end with the last kernel"


def test_what_is_known_needs_no_other_process(tmp_path: Path):
    """With Triton as on a GPU; the machine code of one launch is lost, which is then compiled in this process."""
    first = json.loads(run_script("compile_apart.py", cache=tmp_path))
    shutil.rmtree(next(tmp_path.rglob("*.cubin")).parent)
    found = json.loads(run_script("compile_apart.py", cache=tmp_path))
    assert (first["helpers"], found["helpers"]) == (1, 0)
    assert (found["loaded"], found["compiled"]) == (found["launches"] - 1, 1)


class Work:
    """Launches of a fake kernel, and how often which process compiled one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def launches(self, *elsewhere: str) -> dict[int, Launch]:
        """Return a launch for each thing to do in other processes."""
        arguments = [[str(self.folder), str(os.getpid()), one] for one in elsewhere]
        return {number: Launch(fake_kernels.noting, words, {}) for number, words in enumerate(arguments)}

    def run(self, *elsewhere: str, compiler: Compiler | None = None) -> None:
        wait((compiler or Compiler(Share())).start(self.launches(*elsewhere), CPU))

    @property
    def lines(self) -> dict[int, list[str]]:
        return {int(path.name): path.read_text().splitlines() for path in self.folder.iterdir()}

    @property
    def here(self) -> int:
        return len(self.lines.get(os.getpid(), []))

    @property
    def elsewhere(self) -> list[int]:
        """Numbers of launches that other processes compiled, by process."""
        return [len(lines) for process, lines in self.lines.items() if process != os.getpid()]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Work:
    """Work for one process beside this one, in which the target is a GPU's."""
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetDriver(90))
    monkeypatch.setattr(Share, "helpers", lambda self: 1)
    caplog.set_level(logging.DEBUG, "vllm.milo")
    return Work(tmp_path)


def test_each_launch_is_compiled_elsewhere_and_then_here(work: Work, capfd: pytest.CaptureFixture[str]):
    work.run("print", "print", "print")
    assert work.here == 3
    assert work.elsewhere == [3]
    (process,) = work.lines.keys() - {os.getpid()}
    assert set(work.lines[process]) == {"1 ''"}, "one thread, and no GPU"
    assert capfd.readouterr().out == ""
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_processes_start_again_for_what_comes_later(work: Work):
    compiler = Compiler(Share())
    work.run("compile", compiler=compiler)
    wait(compiler.start({"later": work.launches("print")[0]}, CPU))
    assert (work.here, work.elsewhere) == (2, [1, 1])


def test_no_more_processes_than_are_allowed(work: Work, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Share, "helpers", lambda self: 2)
    work.run(*["compile"] * 8)
    assert work.here == sum(work.elsewhere) == 8
    assert len(work.elsewhere) <= 2


def test_what_fails_elsewhere_is_compiled_here(work: Work, caplog: pytest.LogCaptureFixture):
    work.run("fail", "compile")
    assert (work.here, work.elsewhere) == (2, [2])
    assert "ValueError: does not compile there" in caplog.text


def test_what_fails_everywhere_is_raised(work: Work):
    with pytest.raises(ValueError, match=r"^does not compile$"):
        work.run("break")
    assert (work.here, work.elsewhere) == (1, [1])


def test_what_cannot_be_sent_is_compiled_here(work: Work, caplog: pytest.LogCaptureFixture):
    launches = work.launches("compile", "compile")
    launches[0].constants["function"] = lambda: None
    wait(Compiler(Share()).start(launches, CPU))
    assert (work.here, work.elsewhere) == (2, [1])
    assert "pickle" in caplog.text


def test_a_lost_process_is_not_replaced(work: Work, caplog: pytest.LogCaptureFixture):
    work.run("die", "die", "die")
    assert (work.here, work.elsewhere) == (3, [1])
    assert "a helper ended with status 3" in caplog.text


def test_a_process_that_hangs_is_given_up(work: Work, monkeypatch: pytest.MonkeyPatch):
    helper = Helper(90)
    first, second = (pickle.dumps(job_of(launch)) for launch in work.launches("compile", "hang").values())
    assert helper.compile(first) is None
    monkeypatch.setattr(helpers, "PATIENCE", 0.1)
    with pytest.raises(EOFError):
        helper.compile(second)
    assert helper.end() == -9


@pytest.mark.parametrize("executable", ["/bin/false", "/nowhere/python"])
def test_without_processes_this_one_compiles(executable: str, work: Work, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", executable)
    work.run("compile", "compile")
    assert (work.here, work.elsewhere) == (2, [])


def test_the_others_compile_for_nvidias_gpus_alone(work: Work, monkeypatch: pytest.MonkeyPatch):
    driver = TargetDriver(90)
    driver.target = type(driver.target)("hip", "gfx942", 64)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    work.run("compile")
    assert (work.here, work.elsewhere) == (1, [])


def test_compiling_does_without_notes(
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
):
    """The kernel has a key; the cache can be written, or not."""
    monkeypatch.setattr(fake_kernels.noting, "cache_key", "a key", raising=False)
    monkeypatch.setattr(fake_kernels.noting, "params", [], raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    work.run("compile")
    assert (work.here, work.elsewhere) == (1, [])
    assert "NotADirectoryError" in caplog.text
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    for _ in range(2):
        work.run("compile")
    assert (work.here, work.elsewhere) == (3, [1]), "the second is known"


_KILLED = """
import os, pickle, signal, sys
from vllm_milo.kernels.compiling.helpers import Helper
helper = Helper(90)
assert helper.compile(pickle.loads(bytes.fromhex(sys.argv[1]))) is None
print(helper._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_ends_the_others_too(work: Work):
    job = pickle.dumps(pickle.dumps(job_of(work.launches("compile")[0])))
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", _KILLED, job.hex()]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -9
    status, end = Path(f"/proc/{int(done.stdout)}/status"), time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text():  # nobody may be there to wait for it
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_end_of_its_input_ends_a_process():
    helper = Helper(90)
    helper._jobs.close()
    assert helper._process.wait(timeout=60) == 0
    helper.end()


def test_processes_take_all_of_the_cores_but_one(monkeypatch: pytest.MonkeyPatch):
    for cores, expected in ((1, 1), (2, 1), (8, 7), (192, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert Share().helpers() == expected
    assert [Share(0, size).helpers() for size in (8, 24, 64)] == [8, 7, 2]
    assert Compiler(Share(0, 24))._pool._max_workers == 7


@pytest.mark.gpu
def test_a_gpu_loads_what_another_process_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit))
    arguments = [Pointer(torch.float32, 0), Pointer(torch.bfloat16, 0), 4096]
    constants = {"SPLIT_K": 2, "BLOCK": 64, "PDL": False, "num_warps": 2}  # as no layer has them
    launch = Launch(_sum_splits_kernel, arguments, constants)
    wait(Compiler(Share()).start({"one": launch}, torch.device("cuda", 0)))
    assert found == [True]
