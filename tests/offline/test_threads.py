"""How many threads a conversion takes on a CPU, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_milo.offline import threads


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups without a limit, on a machine of eight cores."""
    own = tmp_path / "own"
    own.write_text("0::/pod/run\n", encoding="utf-8")
    (tmp_path / "cgroup" / "pod" / "run").mkdir(parents=True)
    (tmp_path / "cgroup" / "pod" / "run" / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_OWN_CGROUP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path / "cgroup"


def test_large_matrices_take_the_cores_that_are_allowed(cgroups: Path):
    assert threads.sensible_threads(threads.SMALL) == 1
    assert threads.sensible_threads(3 * threads.SMALL) == 3  # a core's share is worth a thread
    assert threads.sensible_threads(2**24) == 8
    for quota, number in (("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("broken", 8)):
        (cgroups / "pod" / "cpu.max").write_text(quota, encoding="utf-8")  # of the group above the own
        assert threads.sensible_threads(2**24) == number


def test_the_first_version_of_control_groups(cgroups: Path, tmp_path: Path):
    (tmp_path / "own").write_text("3:memory:/x\n2:cpu,cpuacct:/job\n", encoding="utf-8")
    (cgroups / "cpu" / "job").mkdir(parents=True)
    (cgroups / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n", encoding="utf-8")
    for quota, number in (("300000", 3), ("-1", 8)):
        (cgroups / "cpu" / "job" / "cpu.cfs_quota_us").write_text(quota, encoding="utf-8")
        assert threads.sensible_threads(2**24) == number


def test_the_users_number_wins_and_torch_has_its_own_again(cgroups: Path, monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads.threads_for(64):
            assert torch.get_num_threads() == 3  # the tests set OMP_NUM_THREADS
        monkeypatch.delenv("OMP_NUM_THREADS")
        with threads.threads_for(64):
            assert torch.get_num_threads() == 1
        with threads.threads_for(2**24):
            assert torch.get_num_threads() == 3  # no more than torch took by itself
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("chosen", "seen"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_threads_of_the_command_sleep_while_they_wait(chosen: dict[str, str], seen: str):
    """libgomp tells on stderr what it took from the environment; what the command starts gets none of it."""
    code = "import os, vllm_milo.offline.cli; print(os.environ.get('OMP_WAIT_POLICY'))"
    kept = {name: value for name, value in os.environ.items() if name not in threads.CHOSEN_WAITING}
    environment = kept | {"OMP_DISPLAY_ENV": "true"} | chosen
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{seen}'" in done.stderr
    assert done.stdout.strip() == str(chosen.get("OMP_WAIT_POLICY"))
