"""A source model that runs with one decoder layer in memory at a time, as transformers runs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError
from .family import Family
from .foreign import empty_model, load_config
from .layers import BROKEN

Tensors = Iterable[tuple[str, torch.Tensor]]
"""Names and tensors, as they stand in a source model."""

Load = Callable[[str], Tensors]
"""Returns the tensors whose names begin with a prefix."""


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
        self._model = _empty_model(folder, dtype)
        self._arguments: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._model.model.layers)

    @property
    def hidden_size(self) -> int:
        """Return the numbers in the hidden state of a token."""
        return int(self._model.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Return the number of logits of a token."""
        return int(self._model.config.vocab_size)

    def begin(self, windows: torch.Tensor, home: torch.device | None = None) -> torch.Tensor:
        """Return the hidden states [W, T, H] before the first layer.

        Args:
            windows: of token ids, int64 [W, T].
            home: where the hidden states are kept; by default on the model's device.

        Raises:
            ConversionError: a token id lies outside the embedding.
        """
        self._arguments = self._layer_arguments(windows.shape[1])
        embedding = self._one("model.embed_tokens.weight")
        if windows.max() >= len(embedding):
            raise ConversionError(
                f"{self.folder}: the tokenizer gives token id {int(windows.max())}, but model.embed_tokens.weight has "
                f"{len(embedding)} rows; do tokenizer and model belong together?"
            )
        states = torch.nn.functional.embedding(windows.to(embedding.device), embedding)
        return states.to(home or self.device, self.dtype)

    def layer(self, index: int) -> torch.nn.Module:
        """Return a decoder layer with its weights; :meth:`drop` it after use.

        Raises:
            ConversionError: the files lack a parameter or an expert that transformers needs, or hold one that it does
                not know, that has another shape, or with NaN or Inf.
        """
        module = self._model.model.layers[index]
        module.to_empty(device=self.device)
        name = f"model.layers.{index}."
        parameters = {self._family.checkpoint_name(name + n): p.data for n, p in module.named_parameters()}
        needed = {p: values.numel() for p, values in parameters.items()}
        needed |= {name + buffer: values.numel() for buffer, values in module.named_buffers()}
        finite = {}
        for tensor, values in self._load(name):
            target, place = self.place(tensor, parameters)
            if target not in parameters:
                raise ConversionError(f"{self.folder}: {tensor}: transformers has no such parameter; {self._advice}")
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
                f"{self.folder}: model.layers.{index}: transformers needs {missing}, which the model's files lack as a "
                f"whole or in part; {self._advice}"
            )
        if finite and not torch.stack(list(finite.values())).all():
            bad = next(tensor for tensor, good in finite.items() if not good)
            raise ConversionError(f"{self.folder}: tensor {bad} holds NaN or Inf; {BROKEN}")
        return module

    def parameters(self, index: int, module: torch.nn.Module) -> dict[str, str]:
        """Return the module's own name of each of a layer's parameters, by its name in checkpoints."""
        name = f"model.layers.{index}."
        return {self._family.checkpoint_name(name + n): n for n, _ in module.named_parameters()}

    def drop(self, module: torch.nn.Module) -> None:
        """Free the weights of a layer."""
        module.to("meta")

    def run(self, index: int, module: Callable[..., Any], states: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [b, T, H] after a layer; ``module`` is the layer or what calls it."""
        out = module(states, **self._arguments[index])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, index: int, module: torch.nn.Module, states: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the hidden states [W, T, H] of all windows after a layer, ``batch`` windows at a time."""
        after = torch.empty_like(states)
        for part, place in zip(states.split(batch), after.split(batch), strict=True):
            place.copy_(self.run(index, module, part))
        return after

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what makes logits, float32 [.., V], of hidden states [.., H] after the last layer.

        Raises:
            ConversionError: the files lack the output head, or it has another shape than config.json says.
        """
        norm = self._model.model.norm.to_empty(device=self.device)
        norm.weight.data.copy_(self._one("model.norm.weight"))
        tied = self._model.config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        weight = self._one(name).to(self.device, self.dtype)
        if weight.shape != (self.vocabulary, self.hidden_size):
            raise ConversionError(
                f"{self.folder}: tensor {name} has shape {list(weight.shape)}, but by config.json it must have "
                f"{[self.vocabulary, self.hidden_size]}; do they belong together?"
            )
        return lambda states: torch.nn.functional.linear(norm(states), weight).float()

    def place(self, tensor: str, parameters: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        """Return which of a layer's parameters a tensor belongs to, and its place in it; see :func:`place_tensor`."""
        return place_tensor(self._family, tensor, parameters)

    def _one(self, name: str) -> torch.Tensor:
        found = dict(self._load(name))
        if name not in found:
            raise ConversionError(f"{self.folder}: {name}: missing; are the model's files complete?")
        return found[name]

    @torch.no_grad()
    def _layer_arguments(self, length: int) -> list[dict[str, Any]]:
        """Return what the model calls each layer with beside hidden states: masks and positions of one window."""
        body = self._model.model
        layers, norm = body.layers, body.norm
        body.rotary_emb = type(body.rotary_emb)(config=self._model.config).to(self.device)
        body.layers = torch.nn.ModuleList(_Recorder(layer) for layer in layers)
        body.norm = torch.nn.Identity()
        states = torch.zeros(1, length, self.hidden_size, device=self.device, dtype=self.dtype)
        body(inputs_embeds=states, use_cache=False)
        calls = [recorder.arguments for recorder in body.layers]
        body.layers, body.norm = layers, norm
        return calls


class _Recorder(torch.nn.Module):
    """Stands for a decoder layer and records what it is called with."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden_states


def _empty_model(folder: Path, dtype: torch.dtype) -> Any:
    """Return the Hugging Face model without weights, on the meta device."""
    import transformers

    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(transformers.AutoModelForCausalLM, config, folder, dtype)
    use_grouped_experts(model)
    return model.requires_grad_(False)


def place_tensor(family: Family, tensor: str, parameters: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """Return which parameter of a model of transformers a tensor belongs to, and its place in it.

    Tensors of one expert have their place in the fused 3-D tensors that transformers 5 holds.

    Args:
        family: of the model.
        tensor: its name in the source model.
        parameters: by their names in checkpoints.

    Raises:
        ConversionError: transformers holds the experts of this model otherwise.
    """
    name = family.checkpoint_name(tensor)
    expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", name)
    if expert is None or name in parameters:
        return name, parameters.get(name, torch.empty(0))
    role = family.role(expert[3])
    fused = f"{expert[1]}.{'down_proj' if role == 'down' else 'gate_up_proj'}"
    if fused not in parameters:
        raise ConversionError(f"{fused}: transformers holds the experts of this model otherwise; use its version 5")
    held = parameters[fused][int(expert[2])]
    if role == "down":
        return fused, held
    half = held.shape[0] // 2
    return fused, held[:half] if role == "gate" else held[half:]


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
