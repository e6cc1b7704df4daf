"""What vLLM does to weights, while it loads them or with adapters, that would make quantized ones wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_milo.names import leaf_of
from vllm_milo.values import CheckpointError

_PERMUTED = {"Llama4": ("q_proj", "k_proj")}
"""Projections whose rows vLLM reorders in codes and scales, but not in zero points and factors, by a word that the
names of the architectures have in them."""


def refuse_permuted(parts: Iterable[str], architectures: Iterable[str]) -> None:
    """Refuse quantized matrices that vLLM would tear apart from their zero points and factors.

    Args:
        parts: checkpoint names of the matrices.
        architectures: of the model, by its config.json.

    Raises:
        CheckpointError: there is such a matrix; the message says how to convert the model.
    """
    names = [
        leaf for word, leaves in _PERMUTED.items() if any(word in name for name in architectures) for leaf in leaves
    ]
    for part in parts:
        if leaf_of(part) in names:
            raise CheckpointError(
                f"{part}: vLLM reorders the rows of this model's {' and '.join(names)} as it loads them, which would "
                f"part them from their zero points and factors; convert the model with "
                rf"--ignore 're:.*self_attn\.[qkv]_proj'"
            )


def refuse_adapters(prefix: str, targets: Sequence[str] | None) -> None:
    """Refuse LoRA that may change routed experts.

    Args:
        prefix: vLLM's name of a layer's experts.
        targets: the modules that adapters may change; None for any.

    Raises:
        CheckpointError: it may.
    """
    if targets is None or any("experts" in target.split(".") for target in targets):
        raise CheckpointError(
            f"{prefix}: MiLo does not support LoRA on experts; where adapters have none there, name what they change, "
            f"as in --lora-target-modules q_proj k_proj v_proj o_proj"
        )
