"""What an entry of the table of families means: names of modules, and nothing else.

Fused 3-D experts, which transformers 5 holds in memory and some checkpoints store, are split into the per-expert 2-D
names that vLLM's loader of the family accepts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from vllm_milo.names import EXPERT_PROJECTIONS, leaf_of

from ..errors import ConversionError, FamilyError
from ..nouns import Kind
from .slots import FUSED, LLAMA, Cut, FusedTensor, Projections, Rename, Slot, Stack

LATER_LAYERS = "model.layers.+"
"""Stands in :attr:`Family.ahead` for the decoder layers from the number of layers that config.json states on."""
_EXPERT = re.compile(r"experts\.(?:0|[1-9][0-9]{0,5})\.(\w+)")
_NAMED_ALIKE = ("gate", "shared_expert_gate")
"""Last parts of names that are one pattern of ``ignore``, in whatever block."""


class FusedExperts(NamedTuple):
    """A 3-D tensor [E, N, K] that holds one or two matrices of every expert, stacked along N.

    Attributes:
        experts: name of their module.
        projections: whose matrices they are.
        hidden_side: which dimension of [E, N, K] is the hidden size.
        transposed: whether the family's makers store it as [E, K, N].
        in_memory: whether transformers holds it so as well.
        interleaved: whether the rows of the two matrices alternate.
    """

    experts: str
    projections: tuple[str, ...]
    hidden_side: int
    transposed: bool
    in_memory: bool
    interleaved: bool

    def rows(self, part: int, n: int) -> slice:
        """Return which rows are those of a matrix, the ``part``-th of n rows each."""
        return slice(part, None, len(self.projections)) if self.interleaved else slice(part * n, (part + 1) * n)

    def joined(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the matrices [N, K] of an expert, one or two, in one as the tensor has them, [.., K]."""
        return torch.stack(list(matrices), 1).flatten(0, 1) if self.interleaved else torch.cat(list(matrices))

    def lies_transposed(self, shape: Sequence[int], hidden: int | None) -> bool:
        """Return whether a tensor of these experts is [E, K, N], by its shape and the model's hidden size.

        A family whose makers store that has the other layout in transformers' memory.
        """
        return self.transposed and len(shape) == 3 and (self.in_memory or shape[self.hidden_side] != hidden)


@dataclass(frozen=True)
class Family:
    """The module names of one model family. All names of parts are inside a decoder layer, as in checkpoints.

    Attributes:
        model_type: ``model_type`` of config.json.
        example: models of the family, for people.
        slots: what is quantized beside routed experts; a layer need not have all of them.
        kept: what stays as it is: the router, first, and whatever vLLM or the format could not take quantized.
        block: name of the MoE block; empty where a layer has the experts without one.
        projections: a routed expert's gate, up and down projection.
        fused: the block's 3-D tensors that hold matrices of all experts.
        only_fused: whether makers publish, and transformers reads, experts in no other layout.
        num_experts_keys: config.json keys that may hold the number of routed experts.
        no_experts_key: config.json key of how many more a router chooses among, which have no weights.
        experts_width_keys: config.json keys of the size of what experts read and put out; the first there counts.
        num_layers_key: config.json key of the number of decoder layers.
        ahead: beginnings of names of what predicts further tokens; kept as a whole. See :data:`LATER_LAYERS`.
        beside: beginnings of names of what is no part of the text model, as towers for images; kept as a whole.
        body: name of the text model without its output head: of what has the embeddings, the layers and the last norm;
            empty where names begin with these.
        body_in_memory: what transformers 5 calls the body in memory, where it is not what checkpoints do.
        head: name of the output head.
        head_in_memory: what transformers 5 calls the output head in memory, where it is not what checkpoints do.
        text_config: the keys of config.json, within each other, that lead to the text model's; none where it is all.
        mixers: parts of a layer of which each layer has exactly one: kinds of attention, or what takes its place; or
            tensors.
        layer_kinds_keys: config.json keys that may list each layer's kind, where kinds with the same mixer differ in
            tensors or shapes; the first that is there counts.
        renames: what transformers 5 calls otherwise in memory.
        stacks: what transformers 5 holds as one tensor in memory.
        embed: name, inside the body, of the tokens' embeddings.
        norm: name, inside the body, of the last norm before the output head.
        logits_divisor_key: config.json key of what logits are divided by, where there is such a thing.
        logits_factor_key: config.json key of what logits are multiplied by, where there is such a thing.
        logits_cap_key: config.json key of a c where logits x become c·tanh(x/c).
        states: what config.json says of a checkpoint otherwise than of its source, by key.
        not_run: why transformers' class does not run what the files hold; empty where it does.
        not_learned: why nothing is learned of the family along a text, though transformers runs it; empty where it is.
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
    only_fused: bool = False
    num_experts_keys: tuple[str, ...] = ("num_experts",)
    no_experts_key: str | None = None
    experts_width_keys: tuple[str, ...] = ("hidden_size",)
    num_layers_key: str = "num_hidden_layers"
    ahead: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    body: str = "model"
    body_in_memory: str | None = None
    head: str = "lm_head"
    head_in_memory: str | None = None
    text_config: tuple[str, ...] = ()
    mixers: tuple[str, ...] = ("self_attn",)
    layer_kinds_keys: tuple[str, ...] = ()
    renames: tuple[Rename, ...] = ()
    stacks: tuple[Stack, ...] = ()
    embed: str = "embed_tokens"
    norm: str = "norm"
    logits_divisor_key: str | None = None
    logits_factor_key: str | None = None
    logits_cap_key: str | None = None
    states: tuple[tuple[str, str], ...] = ()
    not_run: str = ""
    not_learned: str = ""
    runs_as: str | None = None
    note: str = ""
    status: str = "converts"

    @cached_property
    def _slots(self) -> dict[str, Slot]:
        return {slot.name: slot for slot in self.slots}

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        """The pattern of names in a decoder layer: the layer's, its number, and the rest."""
        return re.compile(rf"({re.escape(self.in_body)}layers\.(\d+))\.(.+)")

    @property
    def leaves_in_memory(self) -> tuple[str, str]:
        """Return what transformers 5 calls the 3-D tensors of a layer's experts: what reads their input, and down."""
        return "up_proj" if self.projections.gate is None else "gate_up_proj", "down_proj"

    @property
    def in_block(self) -> str:
        """Return what names of a layer's MoE block begin with, inside the layer."""
        return f"{self.block}." if self.block else ""

    @property
    def in_body(self) -> str:
        """Return what names in the text model without its output head begin with."""
        return f"{self.body}." if self.body else ""

    @property
    def embedding(self) -> str:
        """Return the name of the tensor that holds the tokens' embeddings."""
        return f"{self.in_body}{self.embed}.weight"

    @property
    def last_norm(self) -> str:
        """Return the name of the last norm before the output head."""
        return f"{self.in_body}{self.norm}"

    def layer_name(self, index: int) -> str:
        """Return the name of a decoder layer."""
        return f"{self.in_body}layers.{index}"

    def layer_of(self, name: str) -> str | None:
        """Return the name of the decoder layer that a tensor or module lies in; None for any other."""
        layer = self._layer.fullmatch(name)
        return layer[1] if layer else None

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a config.json states of the text model; what its part for that leaves out, the whole states.

        ``model_type`` stays that of the whole.

        Raises:
            ConversionError: there is no such part.
        """
        found: dict[str, Any] = dict(config)
        part: Any = config
        for key in self.text_config:
            part = part.get(key)
            if not isinstance(part, Mapping):
                place = ".".join(self.text_config)
                raise ConversionError(f"config.json: has no {place}, the text model's; copy the file again")
            found |= {name: value for name, value in part.items() if value is not None and name != "model_type"}
        return found

    def _inside(self, module: str) -> str | None:
        """Return the name of a module inside its decoder layer; None for what belongs to none."""
        layer = self._layer.fullmatch(module)
        return layer[3] if layer else None

    def _projection(self, inside: str) -> str | None:
        """Return which projection of a routed expert a module is; None for any other."""
        expert = None
        if inside.startswith(self.in_block):
            expert = _EXPERT.fullmatch(inside.removeprefix(self.in_block))
        return expert[1] if expert is not None and expert[1] in self.projections.present else None

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
        layer = self._layer.fullmatch(self.checkpoint_name(tensor))
        held = next((one for one in self.fused if layer and layer[3] == f"{self.in_block}{one.name}"), None)
        if layer is None or held is None:
            return None
        named = self.projections._asdict()
        projections = tuple(named[role] for role in held.holds)
        hidden_side = 1 if "down" in held.holds else 2
        return FusedExperts(f"{layer[1]}.{self.in_block}experts", projections, hidden_side, *held[2:])

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
        if self.body_in_memory is not None and tensor.startswith(f"{self.body_in_memory}."):
            tensor = self.body + tensor.removeprefix(self.body_in_memory)
        layer = self._layer.fullmatch(tensor) if self.renames else None
        if layer is None:
            return tensor
        for memory, checkpoint in self.renames:
            if layer[3].startswith(memory):
                return f"{layer[1]}.{checkpoint}{layer[3].removeprefix(memory)}"
        return tensor

    def stacked_place(self, tensor: str) -> tuple[str, int, int] | None:
        """Return where transformers 5 holds a tensor that it stacks with others: its name, which part, of how many.

        None for any other tensor, or where it is not in a decoder layer.
        """
        layer = self._layer.fullmatch(tensor)
        for stack in self.stacks if layer else ():
            if layer is not None and layer[3] in stack.parts:
                return f"{layer[1]}.{stack.memory}", stack.parts.index(layer[3]), len(stack.parts)
        return None

    @property
    def router(self) -> str:
        """Return the name, inside its layer, of what chooses experts: the first of what is kept in their block."""
        return next(name for name in self.kept if name.startswith(self.in_block))

    def is_kept(self, module: str) -> bool:
        """Return whether a module of a decoder layer stays as it is because the table says so."""
        return self._inside(module) in self.kept

    def whole_pattern(self, tensor: str, layers: int | None) -> str | None:
        """Return the pattern of ``ignore`` for what is kept as a whole; None for a tensor of the text model itself.

        That is what predicts further tokens, and what stands beside the text model.

        Args:
            tensor: its name.
            layers: number of decoder layers that config.json states; None where it does not.
        """
        layer = self._layer.fullmatch(tensor)
        if layer and LATER_LAYERS in self.ahead and layers is not None and int(layer[2]) >= layers:
            return rf"re:{re.escape(layer[1])}\..*"
        start = next((start for start in (*self.ahead, *self.beside) if tensor.startswith(start)), None)
        return None if start is None else f"re:{re.escape(start)}.*"

    @property
    def ignore(self) -> tuple[str, ...]:
        """Patterns of linear layers that are never quantized: output head, and routers that are called alike."""
        leaves = {leaf_of(name) for name in self.kept}
        return (self.head, *(rf"re:.*\.{leaf}$" for leaf in _NAMED_ALIKE if leaf in leaves))

    def num_layers(self, config: Mapping[str, Any]) -> int | None:
        """Return the number of decoder layers that the text model's settings state; None where they do not."""
        return config.get(self.num_layers_key)

    def experts_width(self, config: Mapping[str, Any]) -> int | None:
        """Return the size of what experts read and put out, by the text model's settings; None where they state none.

        That is the hidden size, but for experts that work on a smaller latent of it.
        """
        return next((int(config[key]) for key in self.experts_width_keys if config.get(key)), None)

    def num_choices(self, config: Mapping[str, Any]) -> int:
        """Return how many a router chooses among: experts, and such as have no weights.

        Raises:
            ConversionError: see :meth:`num_experts`.
        """
        return self.num_experts(config) + int(config.get(self.no_experts_key or "") or 0)

    def num_experts(self, config: Mapping[str, Any]) -> int:
        """Return the number of routed experts that the text model's settings state.

        Raises:
            FamilyError: it states none.
        """
        for key in self.num_experts_keys:
            value = config.get(key)
            if type(value) is int and value > 0:
                return value
        raise FamilyError(
            f"config.json: no {' or '.join(self.num_experts_keys)}; is this {self.model_type} model a MoE?"
        )
