"""A source model that runs with one decoder layer in memory at a time, as transformers runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_milo.names import split_expert_name

from ..errors import ConversionError
from ..families.family import Family
from ..nouns import LoadedMatrix
from .foreign import empty_model, load_config
from .layers import BROKEN
from .states import StatesHome
from .whole_model import model_class

Tensors = Iterable[tuple[str, torch.Tensor]]
"""Names and tensors, as they stand in a source model."""

Load = Callable[[str], Tensors]
"""Returns the tensors whose names begin with a prefix."""

_WINDOWS = 8
"""Windows whose embeddings are made ready for the first layer at once."""
_POSITIONS = ("rotary_emb", "pos_emb")
"""Names of what makes a model's position embeddings, which has no weights in files."""
_EMBEDDING_SCALE = "scalar_embed_scale"
"""Attribute of embeddings that are multiplied before the text model gets them."""
_LAYER_KINDS = ("attention_type", "layer_type", "block_type")
"""Attributes of a layer by which models choose what they call it with."""


class StreamedModel:
    """The layers of a causal language model, each loaded when its turn comes.

    Args:
        folder: of the model, for its config.json and, where it brings any, its code.
        family: of the model.
        load: the model's tensors by prefix of their names.
        device: where layers run.
        dtype: of weights and hidden states.
        advice: what errors tell the user to do where transformers cannot run the tensors of a layer.

    Raises:
        ConversionError: transformers cannot run this architecture.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        load: Load,
        device: torch.device,
        dtype: torch.dtype,
        advice: str = "use --calibration none",
    ) -> None:
        self.folder, self._family, self._load, self._advice = folder, family, load, advice
        self.device, self.dtype = device, dtype
        self._model = _empty_model(folder, family, dtype)
        self._body = self._model.get_submodule(family.body_in_memory or family.body)
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __len__(self) -> int:
        return len(self._body.layers)

    @property
    def hidden_size(self) -> int:
        """Return the numbers in the hidden state of a token."""
        return int(self._body.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Return the number of logits of a token."""
        return int(self._body.config.vocab_size)

    def begin(self, windows: torch.Tensor, home: StatesHome | None = None) -> torch.Tensor:
        """Return the hidden states [W, T, H] before the first layer.

        Args:
            windows: of token ids, int64 [W, T].
            home: where the hidden states are kept; by default on the model's device.

        Raises:
            ConversionError: a token id lies outside the embedding, or there is no room for the states.
        """
        empty = torch.zeros(1, windows.shape[1], self.hidden_size, device=self.device, dtype=self.dtype)
        self._arguments = self._enter(empty)[1]
        embedding = self._one(self._family.embedding)
        if windows.max() >= len(embedding):
            raise ConversionError(
                f"{self.folder}: the tokenizer gives token id {int(windows.max())}, but {self._family.embedding} "
                f"has {len(embedding)} rows; do tokenizer and model belong together?"
            )
        scale = torch.tensor(getattr(getattr(self._body, self._family.embed), _EMBEDDING_SCALE, 1.0), dtype=self.dtype)
        states = (home or StatesHome(self.device)).empty((*windows.shape, self.hidden_size), self.dtype)
        for part, place in zip(windows.split(_WINDOWS), states.split(_WINDOWS), strict=True):
            embedded = torch.nn.functional.embedding(part.to(embedding.device), embedding).to(self.dtype)
            place.copy_(self._enter((embedded * scale.to(embedded.device)).to(self.device))[0])
        return states

    def layer(self, index: int) -> torch.nn.Module:
        """Return a decoder layer with its weights; :meth:`drop` it after use.

        Raises:
            ConversionError: the files lack a parameter or an expert that transformers needs, or hold one that it does
                not know, that has another shape, or with NaN or Inf.
        """
        module = self._body.layers[index]
        module.to_empty(device=self.device)
        name = f"{self._family.layer_name(index)}."
        _widen_buffers(module)
        held = (*module.named_parameters(), *module.named_buffers())
        parameters = {self._family.checkpoint_name(name + n): values.data for n, values in held}
        needed = {p: values.numel() for p, values in parameters.items()}
        finite = {}
        for tensor, values in self._load(name):
            target, place = self.place(tensor, parameters)
            if target not in parameters:
                raise ConversionError(f"{self.folder}: {tensor}: transformers has no such parameter; {self._advice}")
            fused = self._family.fused_experts(tensor)
            if fused is not None and not fused.in_memory and fused.lies_transposed(values.shape, self.hidden_size):
                values = values.mT
            if place.shape != values.shape:
                raise ConversionError(
                    f"{self.folder}: tensor {tensor} has shape {list(values.shape)}, but by config.json it must have "
                    f"{list(place.shape)}; do they belong together?"
                )
            place.copy_(values)
            finite[tensor] = torch.isfinite(place).all()  # there, and looked at once: a GPU does not wait for each
            needed[target] -= values.numel()  # an expert's matrix is a part of one
        missing = sorted(parameter for parameter, numbers in needed.items() if numbers)
        if missing:
            raise ConversionError(
                f"{self.folder}: {name[:-1]}: transformers needs {missing}, which the model's files lack as a whole or "
                f"in part; {self._advice}"
            )
        if finite and not torch.stack(list(finite.values())).all():
            bad = next(tensor for tensor, good in finite.items() if not good)
            raise ConversionError(f"{self.folder}: tensor {bad} holds NaN or Inf; {BROKEN}")
        return module

    def parameters(self, index: int, module: torch.nn.Module) -> dict[str, str]:
        """Return the module's own name of each of a layer's parameters, by its name in checkpoints."""
        name = f"{self._family.layer_name(index)}."
        return {self._family.checkpoint_name(name + n): n for n, _ in module.named_parameters()}

    def drop(self, module: torch.nn.Module) -> None:
        """Free the weights of a layer."""
        module.to("meta")

    def run(self, index: int, module: Callable[..., Any], states: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [b, T, H] after a layer; ``module`` is the layer or what calls it."""
        further, named = self._arguments[index]
        out = module(states.to(self.device), *further, **named)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(
        self, index: int, module: torch.nn.Module, states: torch.Tensor, batch: int, home: StatesHome | None = None
    ) -> torch.Tensor:
        """Return the hidden states [W, T, H] of all windows after a layer, ``batch`` windows at a time.

        They are kept at ``home``, or in memory where ``states`` are.
        """
        after = (home or StatesHome(states.device)).empty(states.shape, states.dtype)
        for part, place in zip(states.split(batch), after.split(batch), strict=True):
            place.copy_(self.run(index, module, part))
        return after

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what makes logits, float32 [.., V], of hidden states [.., H] after the last layer.

        Raises:
            ConversionError: the files lack the output head, or it has another shape than config.json says.
        """
        family, config = self._family, self._body.config
        norm = getattr(self._body, family.norm).to_empty(device=self.device)
        for part, values in norm.named_parameters():
            values.data.copy_(self._one(f"{family.last_norm}.{part}"))
        name = family.embedding if config.tie_word_embeddings else f"{family.head}.weight"
        weight = self._one(name).to(self.device, self.dtype)
        bias = None
        if self._model.get_submodule(family.head_in_memory or family.head).bias is not None:
            bias = self._one(f"{family.head}.bias").to(self.device, self.dtype)
        factor = getattr(config, family.logits_factor_key or "", 1) / getattr(
            config, family.logits_divisor_key or "", 1
        )
        if weight.shape != (self.vocabulary, self.hidden_size):
            raise ConversionError(
                f"{self.folder}: tensor {name} has shape {list(weight.shape)}, but by config.json it must have "
                f"{[self.vocabulary, self.hidden_size]}; do they belong together?"
            )
        cap = getattr(config, family.logits_cap_key or "", None)

        def logits(states: torch.Tensor) -> torch.Tensor:
            plain = torch.nn.functional.linear(norm(states), weight, bias).float() * factor
            return plain if cap is None else cap * torch.tanh(plain / cap)

        return logits

    def place(self, tensor: str, parameters: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        """Return which of a layer's parameters a tensor belongs to, and its place in it; see :func:`place_tensor`."""
        return place_tensor(self._family, tensor, parameters)

    def fill(self, parameters: Mapping[str, torch.Tensor], weights: Iterable[LoadedMatrix]) -> None:
        """Overwrite matrices of a layer that is in memory.

        Args:
            parameters: of the layer, by their names in checkpoints.
            weights: the matrices with their new values, [N, K] each, one after the other.
        """
        for matrix, values in weights:
            self.place(f"{matrix.name}.weight", parameters)[1].copy_(values)

    def _one(self, name: str) -> torch.Tensor:
        found = dict(self._load(name))
        if name not in found:
            raise ConversionError(f"{self.folder}: {name}: missing; are the model's files complete?")
        return found[name]

    @torch.no_grad()
    def _enter(self, embedded: torch.Tensor) -> tuple[torch.Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Return hidden states [b, T, H] before the first layer, and what each layer is called with beside them.

        The latter are masks and positions. Some models multiply the embeddings before the first layer.
        """
        body, last = self._body, self._family.norm
        layers, norm = body.layers, getattr(body, last)
        for name in _POSITIONS:
            if getattr(body, name, None) is not None:
                setattr(body, name, type(getattr(body, name))(config=body.config).to(self.device))
        body.layers = torch.nn.ModuleList(_Recorder(layer) for layer in layers)
        setattr(body, last, torch.nn.Identity())
        body(inputs_embeds=embedded, use_cache=False)
        states, calls = body.layers[0].states, [recorder.arguments for recorder in body.layers]
        body.layers = layers
        setattr(body, last, norm)
        return states, calls


class _Recorder(torch.nn.Module):
    """Stands for a decoder layer and records what it is called with."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.states = torch.empty(0)
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        for name in _LAYER_KINDS:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: torch.Tensor, *further: Any, **named: Any) -> torch.Tensor:
        self.states, self.arguments = hidden_states, (further, named)
        return hidden_states


def _widen_buffers(module: torch.nn.Module) -> None:
    """Let a layer hold its buffers in float32: routers' biases are, and 16 bits would send tokens to other experts."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


def _empty_model(folder: Path, family: Family, dtype: torch.dtype) -> Any:
    """Return the Hugging Face model without weights, on the meta device."""
    import transformers

    if family.not_run:
        raise ConversionError(
            f"{folder}: transformers {transformers.__version__} cannot run {family.model_type} a layer at a time: "
            f"{family.not_run}"
        )
    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # what has a text model within itself is no causal language model to transformers
    found = model_class(config, folder) if family.text_config else transformers.AutoModelForCausalLM
    model = empty_model(found, config, folder, dtype)
    use_grouped_experts(model)
    return model.requires_grad_(False)


def place_tensor(family: Family, tensor: str, parameters: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """Return which parameter of a model of transformers a tensor belongs to, and its place in it.

    Tensors of one expert have their place in the fused 3-D tensors that transformers 5 holds; others, which it stacks,
    in what it makes of them.

    Args:
        family: of the model.
        tensor: its name in the source model.
        parameters: by their names in checkpoints.

    Raises:
        ConversionError: transformers holds the experts of this model otherwise.
    """
    name = family.checkpoint_name(tensor)
    stacked = family.stacked_place(name)
    if stacked is not None:
        memory, part, parts = stacked
        return memory, parameters[memory].chunk(parts)[part] if memory in parameters else torch.empty(0)
    expert = split_expert_name(name.removesuffix(".weight"))
    if expert is None or name in parameters:
        return name, parameters.get(name, torch.empty(0))
    experts, index, projection = expert
    places = family.fused_places(experts, projection)
    for fused, part, parts in places:
        if fused in parameters:
            held, whole = family.fused_experts(fused), parameters[fused][index]
            if held is not None and held.in_memory:
                return fused, whole.mT[held.rows(part, whole.shape[1] // parts)]
            return fused, whole.chunk(parts)[part]
    raise ConversionError(f"{places[0][0]}: transformers holds the experts of this model otherwise; use its version 5")


def use_grouped_experts(model: Any) -> None:
    """Let a model of transformers multiply all experts of a layer at once, where it can."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")


def reader_tensors(load: Callable[[str], torch.Tensor], names: Iterable[str]) -> Load:
    """Return the tensors of a source model by prefix of their names."""
    known = list(names)

    def select(prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, load(name)) for name in known if name.startswith(prefix))

    return select
