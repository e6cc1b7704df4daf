"""What a model family is: which matrices a layer has, by the names of modules.

A family knows names only. Fused 3-D experts, which transformers 5 holds in memory and some checkpoints store, are split
into the per-expert 2-D names that vLLM's loader of the family accepts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_milo.names import EXPERT_PROJECTIONS

from ..errors import ConversionError
from ..nouns import Kind


class Projections(NamedTuple):
    """The names of an expert's three matrices."""

    gate: str
    up: str
    down: str


LLAMA_PROJECTIONS = Projections("gate_proj", "up_proj", "down_proj")


class FusedExperts(NamedTuple):
    """A 3-D tensor [E, N, K] that holds one or two matrices of every expert, stacked along N."""

    experts: str
    projections: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """The module names of one model family.

    Attributes:
        model_type: ``model_type`` of config.json.
        moe: name of the MoE block inside a layer, as in checkpoints.
        projections: an expert's gate, up and down projection.
        shared: name of the shared expert inside the block, if any.
        num_experts_keys: config.json keys that may hold the number of experts.
        normalizes_router: whether the weights of a token's experts add up to 1, where config.json
            (``norm_topk_prob``) does not say.
    """

    model_type: str
    moe: str = "mlp"
    projections: Projections = LLAMA_PROJECTIONS
    shared: str | None = None
    num_experts_keys: tuple[str, ...] = ("num_experts",)
    normalizes_router: bool = False

    def kind(self, module: str) -> Kind | None:
        """Return what the matrix ``module`` is part of; None for what is never quantized."""
        layer = re.fullmatch(r"model\.layers\.\d+\.(.+)", module)
        if layer is None:
            return None
        name = layer[1]
        if re.fullmatch(r"self_attn\.(?:\w+_proj|kv_a_proj_with_mqa)", name):
            return Kind.ATTENTION
        if re.fullmatch(rf"{self.moe}\.experts\.(?:0|[1-9][0-9]{{0,5}})\.(?:{'|'.join(self.projections)})", name):
            return Kind.ROUTED_EXPERT
        if self.shared and re.fullmatch(rf"{self.moe}\.{self.shared}\.(?:gate|up|down)_proj", name):
            return Kind.SHARED_EXPERT
        if re.fullmatch(r"mlp\.(?:gate|up|down)_proj", name):
            return Kind.DENSE_FFN
        return None

    def role(self, leaf: str) -> str:
        """Return whether an FFN's projection is its gate, up or down, by the last part of its name."""
        if leaf not in EXPERT_PROJECTIONS:
            raise ValueError(f"{leaf} is no projection of an FFN of {self.model_type}")
        return EXPERT_PROJECTIONS[leaf]

    def fused(self, tensor: str) -> FusedExperts | None:
        """Return which experts' matrices a fused 3-D tensor holds, by its name."""
        match = re.fullmatch(r"(model\.layers\.\d+\.)\w+\.experts\.(gate_up_proj|down_proj)", tensor)
        if match is None:
            return None
        gate, up, down = self.projections
        projections = (gate, up) if match[2] == "gate_up_proj" else (down,)
        return FusedExperts(f"{match[1]}{self.moe}.experts", projections)

    def checkpoint_name(self, tensor: str) -> str:
        """Return the checkpoint name of a tensor that transformers 5 may have renamed in memory."""
        if self.moe == "mlp":
            return tensor
        return re.sub(r"^(model\.layers\.\d+\.)mlp\.", rf"\1{self.moe}.", tensor)

    @property
    def ignore(self) -> tuple[str, ...]:
        """Patterns of the linear layers that are never quantized: routers and output head."""
        patterns = ["lm_head", r"re:.*\.gate$"]
        if self.shared:
            patterns.append(r"re:.*\.shared_expert_gate$")
        return tuple(patterns)

    def num_experts(self, config: Mapping[str, Any]) -> int:
        """Return the number of routed experts that config.json states.

        Raises:
            ConversionError: it states none.
        """
        for key in self.num_experts_keys:
            if config.get(key):
                return int(config[key])
        raise ConversionError(
            f"config.json: no {' or '.join(self.num_experts_keys)}; is this {self.model_type} model a MoE?"
        )
