"""Experts that vLLM's CPU build refuses when it describes or makes a layer, so that tests can serve families with them.

MiLo's layers compute them there as on GPUs; of unquantized ones, beside which those are compared, not all can be.
"""

from __future__ import annotations

from typing import Any

import torch

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


def allow_step() -> None:
    """Let unquantized experts of vLLM's CPU build have Step-3.5's activation, which its operator does not compute."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    step = getattr(MoEActivation, "SWIGLUSTEP", None)
    experts: Any = cpu_moe.CPUUnquantizedExperts
    supports, prepare, apply = experts._supports_activation, experts.process_weights_after_loading, experts.apply

    def prepare_unless_step(self: Any, layer: torch.nn.Module) -> None:
        if self.moe_config.activation is not step:
            prepare(self, layer)

    def compute(self: Any, output: torch.Tensor, hidden_states: torch.Tensor, **arguments: Any) -> None:
        if self.moe_config.activation is not step:
            apply(self, output, hidden_states, **arguments)
            return
        weights, ids = arguments["topk_weights"].to(output.dtype), arguments["topk_ids"]
        output.zero_()
        for expert, (w1, w2) in enumerate(zip(arguments["w1"], arguments["w2"], strict=True)):
            tokens, slots = torch.where(ids == expert)
            gate, up = (hidden_states[tokens] @ w1.T).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)
            output.index_add_(0, tokens, hidden @ w2.T * weights[tokens, slots, None])

    experts._supports_activation = staticmethod(lambda activation: activation is step or supports(activation))
    experts.process_weights_after_loading, experts.apply = prepare_unless_step, compute
