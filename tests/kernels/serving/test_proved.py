"""What is said when another Triton runs than those whose machine code was searched."""

from __future__ import annotations

import logging

import pytest

from vllm_milo.kernels.serving.gemm.proved import PROVED_TRITON, warn_if_unproved


@pytest.mark.parametrize("version", [*PROVED_TRITON, f"{PROVED_TRITON[0]}+git123"])
def test_a_proved_triton_needs_no_word(version: str, caplog: pytest.LogCaptureFixture):
    warn_if_unproved(version)
    assert not caplog.records


def test_another_triton_is_told_once_in_one_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "vllm.milo"):
        warn_if_unproved("3.7.1")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("vllm.milo", logging.WARNING)
    assert PROVED_TRITON[0] in record.message
    assert "3.7.1" in record.message
    assert "\n" not in record.message
