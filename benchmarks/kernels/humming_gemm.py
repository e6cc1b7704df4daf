"""One Humming GEMM of integer codes, dense or over experts, on random weights. Needs humming-kernels and CUDA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.kernels.run import DTYPE
from vllm_milo.kernels.tuning.random_weights import CODE_SPREAD, random_scales, random_words


class Codes(NamedTuple):
    """How weights are held.

    Attributes:
        bits: of a code.
        group: weights that share scale and zero point.
        zeros: ``"none"`` for symmetric codes, as GPTQ's int4 usually is; ``"integers"`` for zero points of a code's
            size, stored in 4 bits; ``"floats"`` for bf16 zero points, which HQQ and MiLo need.
    """

    bits: int
    group: int
    zeros: str


class HummingGemm:
    """A GEMM prepared as vLLM's Humming methods prepare it.

    Kernels are compiled, in parallel, for the given row counts only: the same ones that Humming's heuristics choose
    from their whole table.

    Attributes:
        weights: packed codes, scales and, if there are, zero points in Humming's layout.
    """

    def __init__(
        self,
        n: int,
        k: int,
        experts: int | None,
        rows: Sequence[int],
        codes: Codes,
        device: torch.device,
    ) -> None:
        """Make random weights and choose kernels.

        Args:
            n: outputs.
            k: inputs.
            experts: number of matrices; None for a dense layer.
            rows: row counts (tokens, or tokens times top-k) that will be asked for.
            codes: how weights are held.
            device: a CUDA device.
        """
        from humming.config import GemmType
        from humming.dtypes import DataType
        from humming.layer import HummingMethod
        from humming.schema import HummingWeightSchema

        gemm_type = GemmType.DENSE if experts is None else GemmType.INDEXED
        layer = torch.nn.Module()
        for name, tensor in _random_tensors(n, k, experts, codes, device).items():
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        meta = HummingMethod.prepare_layer_meta(
            layer=layer,
            shape_n=n,
            shape_k=k,
            weight_schema=HummingWeightSchema(
                b_dtype=DataType.from_str(f"uint{codes.bits}"),
                weight_scale_group_size=codes.group,
                has_zero_point=codes.zeros != "none",
                is_fp_zero_point=codes.zeros == "floats",
            ),
            num_experts=experts,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            torch_dtype=DTYPE,
        )
        HummingMethod.transform_humming_layer(layer)
        table = HummingMethod.get_default_tuning_configs(layer=layer, gemm_type=gemm_type)
        self._ranges = [entry for entry in table if any(entry[0] < count <= entry[1] for count in rows)]
        self._configs = {
            "layer_config": meta.to_str(),
            "compute_config": json.dumps(
                {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": gemm_type.value}
            ),
            "tuning_config": json.dumps(self._ranges),
        }
        self._n = n
        self._locks = torch.zeros(1024, dtype=torch.int32, device=device)
        names = ("weight", "weight_scale", *(() if codes.zeros == "none" else ("zero_point",)))
        self.weights = [getattr(layer, name).data for name in names]

    def block_rows(self, rows: int) -> int:
        """Return the rows of a block of the kernel for ``rows``, which an expert's rows are padded to."""
        return next(config["block_shape"][0] for low, high, config in self._ranges if low < rows <= high)

    def __call__(self, weights: Sequence[torch.Tensor], x: torch.Tensor, rows: int, **routing: Any) -> torch.Tensor:
        """Return the product, bf16 [rows, n].

        Args:
            weights: :attr:`weights`, or a copy.
            x: bf16 [*, k].
            rows: rows of the output.
            routing: for experts: ``sorted_ids``, ``expert_ids``, ``num_tokens_padded``, ``top_k``.
        """
        from humming import ops

        out = torch.empty(rows, self._n, dtype=DTYPE, device=x.device)
        weight, scale, *zero = weights
        ops.humming_gemm(
            **self._configs,
            inputs=x,
            weight=weight,
            outputs=out,
            weight_scale=scale,
            zero_point=zero[0] if zero else None,
            locks=self._locks,
            valid_shape_m=rows,
            **routing,
        )
        return out


def _random_tensors(n: int, k: int, experts: int | None, codes: Codes, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors in the layout of Humming checkpoints."""
    lead = () if experts is None else (experts,)
    groups, largest = k // codes.group, 1 << codes.bits
    spread = CODE_SPREAD * (largest / 8)
    tensors = {
        "weight": random_words((*lead, n, k * codes.bits // 32), device),
        "weight_scale": random_scales((*lead, n, groups), 1 / (spread * k**0.5), device).to(DTYPE),
    }
    if codes.zeros == "integers":
        tensors["zero_point"] = random_words((*lead, n * codes.bits // 32, groups), device)
    elif codes.zeros == "floats":
        middle = (largest - 1) / 2
        tensors["zero_point"] = (middle + 0.2 * torch.randn(*lead, n, groups, device=device)).to(DTYPE)
    return tensors
