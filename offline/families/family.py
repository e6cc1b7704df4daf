"""What an entry of the table of families means: names of modules, and nothing else.

Fused 3-D experts, which transformers 5 holds in memory and some checkpoints store, are split into the per-expert 2-D
names that vLLM's loader of the family accepts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from vllm_milo.names import EXPERT_PROJECTIONS, leaf_of

from ..errors import ConversionError
from ..nouns import Kind
from .slots import FUSED, LLAMA, Cut, FusedTensor, Projections, Rename, Slot

LATER_LAYERS = "model.layers.+"
"""Stands in :attr:`Family.ahead` for the decoder layers from the number of layers that config.json states on."""
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_EXPERT = re.compile(r"experts\.(?:0|[1-9][0-9]{0,5})\.(\w+)")
_NAMED_ALIKE = ("gate", "shared_expert_gate")
"""Last parts of names that are one pattern of ``ignore``, in whatever block."""


class FusedExperts(NamedTuple):
    """A 3-D tensor [E, N, K] that holds one or two matrices of every expert, stacked along N."""

    experts: str
    projections: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """The module names of one model family. All names of parts are inside a decoder layer, as in checkpoints.

    Attributes:
        model_type: ``model_type`` of config.json.
        example: models of the family, for people.
        slots: what is quantized beside routed experts; a layer need not have all of them.
        kept: what stays as it is: the router, first, and whatever vLLM or the format could not take quantized.
        block: name of the MoE block.
        projections: a routed expert's gate, up and down projection.
        fused: the block's 3-D tensors that hold matrices of all experts.
        num_experts_keys: config.json keys that may hold the number of routed experts.
        ahead: beginnings of names of what predicts further tokens; kept as a whole. See :data:`LATER_LAYERS`.
        mixers: parts of a layer of which each layer has exactly one: kinds of attention, or what takes its place.
        layer_kinds_keys: config.json keys that may list each layer's kind, where kinds with the same mixer differ in
            tensors or shapes; the first that is there counts.
        renames: what transformers 5 calls otherwise in memory.
        norm: the last norm before the output head.
        logits_divisor_key: config.json key of what logits are divided by, where there is such a thing.
        runs_as: ``model_type`` under which transformers runs the family, where it has no class for its own.
        note: what a user should know of it.
        status: ``served`` where vLLM has served a tiny checkpoint of it like the dequantized model, else ``converts``.
    """

    model_type: str
    example: str
    slots: tuple[Slot, ...]
    kept: tuple[str, ...] = ("mlp.gate",)
    block: str = "mlp"
    projections: Projections = LLAMA
    fused: tuple[FusedTensor, ...] = FUSED
    num_experts_keys: tuple[str, ...] = ("num_experts",)
    ahead: tuple[str, ...] = ()
    mixers: tuple[str, ...] = ("self_attn",)
    layer_kinds_keys: tuple[str, ...] = ()
    renames: tuple[Rename, ...] = ()
    norm: str = "model.norm"
    logits_divisor_key: str | None = None
    runs_as: str | None = None
    note: str = ""
    status: str = "converts"

    @cached_property
    def _slots(self) -> dict[str, Slot]:
        return {slot.name: slot for slot in self.slots}

    def _inside(self, module: str) -> str | None:
        """Return the name of a module inside its decoder layer; None for what belongs to none."""
        layer = _LAYER.fullmatch(module)
        return layer[2] if layer else None

    def _projection(self, inside: str) -> str | None:
        """Return which projection of a routed expert a module is; None for any other."""
        block, expert = f"{self.block}.", None
        if inside.startswith(block):
            expert = _EXPERT.fullmatch(inside.removeprefix(block))
        return expert[1] if expert is not None and expert[1] in self.projections else None

    def kind(self, module: str) -> Kind | None:
        """Return what the matrix ``module`` is part of; None for what is never quantized."""
        inside = self._inside(module)
        if inside is None:
            return None
        if inside in self._slots:
            return self._slots[inside].kind
        return Kind.ROUTED_EXPERT if self._projection(inside) is not None else None

    def cut(self, module: str) -> Cut:
        """Return how vLLM cuts the matrix ``module``, one that is quantized, over the ranks of tensor parallelism.

        Raises:
            ValueError: it is no matrix of this family.
        """
        inside = self._inside(module) or ""
        if inside in self._slots:
            return self._slots[inside].cut
        projection = self._projection(inside)
        if projection is None:
            raise ValueError(f"{module} is no matrix that {self.model_type} quantizes")
        return Cut.INPUTS if projection == self.projections.down else Cut.OUTPUTS

    def role(self, leaf: str) -> str:
        """Return whether an FFN's projection is its gate, up or down, by the last part of its name.

        Raises:
            ValueError: it is none of them.
        """
        if leaf not in EXPERT_PROJECTIONS:
            raise ValueError(f"{leaf} is no projection of an FFN of {self.model_type}")
        return EXPERT_PROJECTIONS[leaf]

    def fused_experts(self, tensor: str) -> FusedExperts | None:
        """Return which experts' matrices a fused 3-D tensor holds, by its name; None for any other tensor."""
        layer = _LAYER.fullmatch(self.checkpoint_name(tensor))
        held = next((one for one in self.fused if layer and layer[2] == f"{self.block}.{one.name}"), None)
        if layer is None or held is None:
            return None
        projections = tuple(getattr(self.projections, role) for role in held.holds)
        return FusedExperts(f"{layer[1]}{self.block}.experts", projections)

    def fused_places(self, experts: str, projection: str) -> list[tuple[str, int, int]]:
        """Return the fused tensors that may hold a projection of all experts: name, which part of N, of how many.

        Args:
            experts: name of the experts' module.
            projection: last part of a matrix's name.

        Raises:
            ValueError: it is no projection of an FFN.
        """
        block, role = experts.removesuffix("experts"), self.role(projection)
        held = (one for one in self.fused if role in one.holds)
        return [(f"{block}{one.name}", one.holds.index(role), len(one.holds)) for one in held]

    def checkpoint_name(self, tensor: str) -> str:
        """Return the checkpoint name of a tensor that transformers 5 may have renamed in memory."""
        layer = _LAYER.fullmatch(tensor) if self.renames else None
        if layer is None:
            return tensor
        for memory, checkpoint in self.renames:
            if layer[2].startswith(memory):
                return f"{layer[1]}{checkpoint}{layer[2].removeprefix(memory)}"
        return tensor

    @property
    def router(self) -> str:
        """Return the name, inside its layer, of what chooses experts: the first of what is kept in their block."""
        return next(name for name in self.kept if name.startswith(f"{self.block}."))

    def is_kept(self, module: str) -> bool:
        """Return whether a module of a decoder layer stays as it is because the table says so."""
        return self._inside(module) in self.kept

    def ahead_pattern(self, tensor: str, layers: int | None) -> str | None:
        """Return the pattern of ``ignore`` for what predicts further tokens; None for a tensor of the model itself.

        Args:
            tensor: its name.
            layers: number of decoder layers that config.json states; None where it does not.
        """
        for start in self.ahead:
            number = re.match(r"model\.layers\.(\d+)\.", tensor)
            if start == LATER_LAYERS and number and layers is not None and int(number[1]) >= layers:
                return rf"re:model\.layers\.{number[1]}\..*"
            if tensor.startswith(start):
                return f"re:{re.escape(start)}.*"
        return None

    @property
    def ignore(self) -> tuple[str, ...]:
        """Patterns of linear layers that are never quantized: output head, and routers that are called alike."""
        leaves = {leaf_of(name) for name in self.kept}
        return ("lm_head", *(rf"re:.*\.{leaf}$" for leaf in _NAMED_ALIKE if leaf in leaves))

    def num_experts(self, config: Mapping[str, Any]) -> int:
        """Return the number of routed experts that config.json states.

        Raises:
            ConversionError: it states none.
        """
        for key in self.num_experts_keys:
            value = config.get(key)
            if type(value) is int and value > 0:
                return value
        raise ConversionError(
            f"config.json: no {' or '.join(self.num_experts_keys)}; is this {self.model_type} model a MoE?"
        )
