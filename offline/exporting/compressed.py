"""Matrices as compressed-tensors stores them in its format ``pack-quantized``: 3 bits, in groups, with zero points.

Ten codes fill a word, whose two highest bits are unused. Codes and zero points stand for integers from -4 to 3, less 4
than what is stored, which is why a zero point must be an integer from 0 to 7. compressed-tensors computes s·(q - z) in
the dtype of the scales.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vllm_milo.checkpoint import BITS, PACKED, SCALE, ZERO
from vllm_milo.kernels.integers import pack_words
from vllm_milo.kernels.packing import MAX_CODE, unpack_codes

from ..errors import ConversionError

ZERO_POINT, SHAPE = "weight_zero_point", "weight_shape"
"""Last names of tensors that MiLo does not have; codes and scales are called as there."""


def export_matrix(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that a matrix becomes, by last name.

    Args:
        name: of the matrix, for messages.
        tensors: packed codes int32 [N, 3K/32], scales and zero points fp16 [N, G], by last name.

    Returns:
        ``weight_packed`` int32 [N, ⌈K/10⌉], ``weight_scale`` fp16 [N, G], ``weight_zero_point`` int32 [⌈N/10⌉, G] and
        ``weight_shape`` int64 [2].

    Raises:
        ConversionError: a zero point is no integer from 0 to 7.
    """
    codes, zero = unpack_codes(tensors[PACKED]), tensors[ZERO].float()
    whole = (zero == zero.round()) & (zero >= 0) & (zero <= MAX_CODE)
    if not bool(whole.all()):
        first = float(zero[~whole][0])
        raise ConversionError(
            f"{name}.{ZERO}: {int((~whole).sum())} of {zero.numel()} zero points are no integers from 0 to {MAX_CODE} "
            f"(the first is {first:g}), and compressed-tensors has no others; quantize the original with "
            f"--method rtn, hqq or mse and --zero-points integer"
        )
    return {
        PACKED: pack_words(codes, BITS),
        SCALE: tensors[SCALE],
        ZERO_POINT: pack_words(zero.to(torch.uint8).T, BITS).T.contiguous(),
        SHAPE: torch.tensor(codes.shape),
    }


def describe_format(sizes: Mapping[str, int], ignore: Iterable[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of compressed-tensors.

    Args:
        sizes: group sizes of what is quantized, by names of linear layers and ``re:`` patterns of routed experts.
        ignore: names and ``re:`` patterns of linear layers that are not quantized.
    """
    (usual, _), *_ = Counter(sizes.values()).most_common()
    targets: dict[int, list[str]] = defaultdict(list)
    for name, size in sizes.items():
        targets[size] += [] if size == usual else [name]
    schemes = [_scheme(["Linear"] if size == usual else names, size) for size, names in targets.items()]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _scheme(targets: list[str], size: int) -> dict[str, Any]:
    weights = {"num_bits": BITS, "type": "int", "symmetric": False, "strategy": "group", "group_size": size}
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
