"""vLLM serves what `milo import` makes: no compensators, and layers that the other tool left unquantized."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_checkpoints import compressed, gptq
from vllm_jobs import DTYPE, assert_matches, job
from vllm_runner import run

from vllm_milo.offline.importing.importer import import_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_imported_checkpoints_equal_the_dequantized_models(sources: dict[str, Path], tmp_path: Path):
    foreign = {
        "mixtral": gptq(sources["mixtral"], tmp_path / "gptq", symmetric=False, kept=("self_attn",)),
        "qwen2_moe": compressed(sources["qwen2_moe"], tmp_path / "compressed", symmetric=False),
    }
    folders = {name: import_checkpoint(made.folder, tmp_path / name).out for name, made in foreign.items()}
    outputs = run(job(folders, dtype=DTYPE), tmp_path)
    for name in folders:
        assert_matches(name, folders, outputs, DTYPE)
