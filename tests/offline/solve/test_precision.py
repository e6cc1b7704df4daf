"""Products of lower precision: on GPUs only, and the setting comes back."""

from __future__ import annotations

import pytest
import torch

from vllm_milo.offline.solve.precision import exact_products, fast_products

CPU = torch.device("cpu")


def test_precision_is_lowered_on_gpus_and_restored():
    before = torch.get_float32_matmul_precision()
    with fast_products(CPU):
        assert torch.get_float32_matmul_precision() == before
    with fast_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        with exact_products(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before

    def fail() -> None:
        with fast_products(torch.device("cuda")):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_float32_matmul_precision() == before
