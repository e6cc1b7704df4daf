"""Experts without a gate, which vLLM's CPU build refuses when it describes a layer, whoever computes it.

MiLo's layers compute them there as on GPUs, so that tests can serve the families that have them.
"""

from __future__ import annotations

from typing import Any

_REFUSAL = "is_act_and_mul=False is supported only for"


def allow_without_gate() -> None:
    """Let vLLM's CPU build describe experts without a gate; it looks at that last."""
    from vllm.model_executor.layers.fused_moe import FusedMoEConfig

    described: Any = FusedMoEConfig.__post_init__

    def describe(self: Any) -> None:
        try:
            described(self)
        except NotImplementedError as error:
            if _REFUSAL not in str(error):
                raise

    FusedMoEConfig.__post_init__ = describe  # type: ignore[method-assign]
