"""Moments from a model of any size: one decoder layer in memory at a time.

The hidden states of all windows go through layer after layer. Gradients would need the whole model at once, so the
moments are those of the inputs alone.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tqdm import tqdm

from ..errors import ConversionError
from ..nouns import Matrix
from ..source.layers import Layer
from ..source.reader import ModelReader
from .hooks import watch
from .text_moments import Calibration


@torch.inference_mode()
def calibrate_streamed(
    reader: ModelReader, windows: torch.Tensor, device: str = "cpu", progress: bool = False
) -> Calibration:
    """Run a model forward over a text, a layer at a time in float32, and gather the moments of its inputs.

    Args:
        reader: the source model.
        windows: int64 [windows, tokens].
        device: where layers run; it holds one layer with its moments and the hidden states of all windows. The
            moments of all layers gather in host memory.
        progress: show a progress bar.

    Raises:
        ConversionError: transformers cannot run this architecture from these files.
    """
    model = _empty_model(reader)
    plan = {layer.name: layer for layer in reader.layers}
    calls = _layer_arguments(model, reader, windows, device)
    embedding = reader.load("model.embed_tokens.weight").float().to(device)
    states = [torch.nn.functional.embedding(window.to(device), embedding).unsqueeze(0) for window in windows]
    del embedding
    calibration = Calibration(gradients=False)
    calibration.tokens = windows.numel()
    bar = tqdm(model.model.layers, desc="calibrate", unit="layer", disable=not progress, file=sys.stderr)
    for index, (module, arguments) in enumerate(zip(bar, calls, strict=True)):
        name = f"model.layers.{index}"
        _materialize(module, plan[name], reader, device)
        undo = watch(module, reader.family, calibration, prefix=f"{name}.")
        for number, state in enumerate(states):
            out = module(state, **arguments)
            states[number] = out[0] if isinstance(out, tuple) else out
        for step in undo:
            step()
        module.to("meta")
        calibration.move(f"{name}.", torch.device("cpu"))
    return calibration


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


def _empty_model(reader: ModelReader) -> Any:
    """Return the Hugging Face model without weights, on the meta device."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(reader.folder)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _layer_arguments(model: Any, reader: ModelReader, windows: torch.Tensor, device: str) -> list[dict[str, Any]]:
    """Return what the model calls each layer with beside hidden states: masks and positions, alike for all windows."""
    body = model.model
    layers, norm = body.layers, body.norm
    body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
    body.layers = torch.nn.ModuleList(_Recorder(layer) for layer in layers)
    body.norm = torch.nn.Identity()
    states = torch.zeros(1, windows.shape[1], model.config.hidden_size, device=device)
    body(inputs_embeds=states, use_cache=False)
    calls = [recorder.arguments for recorder in body.layers]
    body.layers, body.norm = layers, norm
    return calls


def _materialize(module: torch.nn.Module, layer: Layer, reader: ModelReader, device: str) -> None:
    """Load the weights of one decoder layer, split experts into the fused tensors that transformers 5 holds."""
    module.to_empty(device=device)
    parameters = {reader.family.checkpoint_name(f"{layer.name}.{n}"): p for n, p in module.named_parameters()}
    missing = set(parameters)
    for matrix, weights in reader.load_layer(layer, torch.device(device)):
        name, target = _place(matrix, parameters, reader)
        target.copy_(weights)
        missing.discard(name)
    for tensor in layer.others:
        name = reader.family.checkpoint_name(tensor)
        if name not in parameters:
            raise ConversionError(f"{tensor}: transformers has no such parameter; calibrate without it (data-free)")
        parameters[name].copy_(reader.load_finite(tensor))
        missing.discard(name)
    missing.update(name for name, _ in module.named_buffers())
    if missing:
        raise ConversionError(
            f"{layer.name}: transformers needs {sorted(missing)}, which the model's files lack; "
            f"calibrate the whole model (--calibration-moments full) or not at all"
        )


def _place(matrix: Matrix, parameters: dict[str, Any], reader: ModelReader) -> tuple[str, torch.Tensor]:
    """Return the parameter that a matrix [N, K] belongs to, by name, and the place in it."""
    if matrix.experts is None:
        name = f"{matrix.name}.weight"
        return name, parameters[name]
    projection = matrix.name.rpartition(".")[2]
    _, up, down = reader.family.projections
    name = f"{matrix.experts}.{'down_proj' if projection == down else 'gate_up_proj'}"
    if name not in parameters or matrix.expert is None:
        raise ConversionError(f"{name}: transformers holds the experts of this model otherwise; use version 5")
    rows = slice(matrix.n, None) if projection == up else slice(0, matrix.n)
    return name, parameters[name][matrix.expert, rows]
