"""Second moments of a model's activations and gradients on a calibration text.

For every matrix: Σ x·xᵀ of its inputs, and the mean of g·gᵀ, g the gradient of the text's log-likelihood at its
outputs, with labels drawn from the model itself (the Fisher information). tr(G·E·R·Eᵀ) then estimates what an error E
costs in loss, on one scale for all matrices of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .errors import ConversionError
from .families import Family, find_family
from .metric import Moments
from .moments import MAX_FULL_SIZE, LoadedMatrix, moment_numbers
from .ranks import Matrix
from .reader import Layer, ModelReader

UNSEEN = 1e-12
"""Second moment of what the text never reaches, so that such an expert is still quantized by plain squares."""
WINDOW = 512
"""Tokens of a window of :func:`spread_windows`."""
PRIOR_TOKENS = 1.0
"""Correlations are shrunk as if so many times K tokens of uncorrelated inputs had been seen beside the real ones."""


class Moment:
    """A running Σ a·aᵀ (or its diagonal) over rows a, with their number."""

    def __init__(self, size: int) -> None:
        self.full = size <= MAX_FULL_SIZE
        self.rows = 0
        self.total: torch.Tensor | None = None
        self.size = size

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [T, size]."""
        rows = rows.detach().reshape(-1, self.size).float()
        update = rows.mT @ rows if self.full else rows.square().sum(0)
        self.total = update if self.total is None else self.total.add_(update)
        self.rows += rows.shape[0]

    def shrunk(self, device: torch.device) -> torch.Tensor:
        """Return Σ a·aᵀ with correlations shrunk, [size, size] or [size]; the identity's share where none was seen."""
        if self.total is None:
            unseen = torch.full((self.size,), UNSEEN, device=device)
            return unseen.diag_embed() if self.full else unseen
        total = self.total.to(device)
        if not self.full:
            return total
        keep = self.rows / (self.rows + PRIOR_TOKENS * self.size)
        return total * keep + torch.diag_embed(total.diagonal()) * (1 - keep)


class Calibration:
    """The moments of every matrix of a model; see :func:`calibrate`.

    Attributes:
        inputs: of each matrix, by name.
        outputs: of the gradients at its outputs; never filled without ``gradients``.
        tokens: of the text.
        own_text: whether the model wrote the text.
        gradients: whether the costs of errors are those of the loss, comparable over all matrices; without, they are
            squared output errors.
    """

    def __init__(self, gradients: bool = True) -> None:
        self.inputs: dict[str, Moment] = {}
        self.outputs: dict[str, Moment] = {}
        self.tokens = 0
        self.own_text = False
        self.gradients = gradients

    def of_layer(self, reader: ModelReader, layer: Layer, loaded: Sequence[LoadedMatrix]) -> Calibration:
        """Return this, which knows all layers."""
        return self

    def group(self, matrix: Matrix) -> str:
        """Return one name for all: each matrix has its own moments."""
        return ""

    def numbers(self, matrix: Matrix) -> int:
        """Return the numbers in the moments of a matrix, on both sides."""
        sides = (matrix.k, matrix.n) if self.gradients else (matrix.k,)
        return sum(map(moment_numbers, sides))

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint's recipe records."""
        return {
            "calibration": "self" if self.own_text else "text",
            "calibration_tokens": self.tokens,
            "calibration_moments": "full" if self.gradients else "inputs",
        }

    def of(self, matrices: Sequence[Matrix], device: torch.device) -> Moments:
        """Return the moments of matrices of one shape, stacked, per token of the text; no outputs without gradients.

        Raises:
            ConversionError: the model never ran one of them.
        """
        inputs, outputs = [], []
        for matrix in matrices:
            if matrix.name not in self.inputs:
                raise ConversionError(f"{matrix.name}: the calibration found no such module in the model")
            inputs.append(self.inputs[matrix.name].shrunk(device) / max(1, self.tokens))
            if self.gradients:
                outputs.append(self.outputs[matrix.name].shrunk(device) / max(1, self.outputs[matrix.name].rows))
        return Moments(torch.stack(inputs), torch.stack(outputs) if self.gradients else None)

    def move(self, prefix: str, device: torch.device) -> None:
        """Move the moments of the matrices whose names begin with ``prefix``."""
        for name, moment in self.inputs.items():
            if name.startswith(prefix) and moment.total is not None:
                moment.total = moment.total.to(device)

    def record(self, name: str, inputs: Moment, outputs: torch.Tensor) -> None:
        """Take the inputs of a matrix, which others may share, and watch for the gradient at its outputs."""
        self.inputs.setdefault(name, inputs)
        moment = self.outputs.setdefault(name, Moment(outputs.shape[-1]))
        if outputs.requires_grad:
            outputs.register_hook(moment.add)


def spread_windows(tokens: torch.Tensor, number: int, length: int = WINDOW) -> torch.Tensor:
    """Return ``number`` windows [number, length], evenly spread over a text's token ids, as many as it holds.

    Raises:
        ConversionError: the text is shorter than one window, or the number not positive.
    """
    if number < 1:
        raise ConversionError("--calibration-windows must be at least 1")
    whole = tokens.numel() // length
    if whole == 0:
        raise ConversionError(f"the calibration text has {tokens.numel()} tokens; it needs at least {length}")
    number = min(number, whole)
    starts = [index * whole // number * length for index in range(number)]
    return torch.stack([tokens[start : start + length] for start in starts])


def calibrate(model: Any, windows: torch.Tensor, seed: int = 0, progress: bool = False) -> Calibration:
    """Run a model forward and backward over a text and gather the moments of all its linear layers and experts.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        windows: int64 [windows, tokens].
        seed: of the labels that are drawn from the model.
    """
    family = find_family(model.config.to_dict())
    calibration = Calibration()
    generator = torch.Generator(model.device).manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = watch(model, family, calibration)
    try:
        for window in tqdm(windows, desc="calibrate", unit="window", disable=not progress):
            _backward(model, window.to(model.device), generator)
            calibration.tokens += window.numel()
    finally:
        for undo in handles:
            undo()
    return calibration


@torch.enable_grad()
def _backward(model: Any, window: torch.Tensor, generator: torch.Generator) -> None:
    embedded = model.get_input_embeddings()(window.unsqueeze(0)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()


def watch(root: Any, family: Family, calibration: Calibration, prefix: str = "") -> list[Callable[[], None]]:
    """Hook every linear layer that is quantized and replace the forward of fused experts; return the undo steps.

    ``prefix`` is the name of ``root`` in its model, with a dot at the end.
    """
    undo: list[Callable[[], None]] = []
    for name, module in root.named_modules():
        checkpoint = family.checkpoint_name(prefix + name)
        if isinstance(module, torch.nn.Linear) and family.kind(checkpoint) is not None:
            undo.append(module.register_forward_hook(_linear_hook(checkpoint, calibration)).remove)
        elif name.endswith(".experts") and hasattr(module, "gate_up_proj"):
            module.forward = _experts_forward(module, checkpoint, family, calibration)
            undo.append(partial(delattr, module, "forward"))
    return undo


def _linear_hook(name: str, calibration: Calibration) -> Callable[..., None]:
    def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        moment = calibration.inputs.setdefault(name, Moment(args[0].shape[-1]))
        moment.add(args[0])
        calibration.record(name, moment, output)

    return hook


def _experts_forward(module: Any, name: str, family: Family, calibration: Calibration) -> Callable[..., torch.Tensor]:
    """Return a forward of fused experts (transformers 5) that records every expert's inputs and gradients."""
    gate_name, up_name, down_name = family.projections
    moments: dict[tuple[int, str], Moment] = {}
    inner = module.down_proj.shape[-1]
    hidden = module.down_proj.shape[-2]
    for expert in range(module.down_proj.shape[0]):
        prefix = f"{name}.{expert}"
        moments[expert, "in"], moments[expert, "mid"] = Moment(hidden), Moment(inner)
        for leaf, key, width in ((gate_name, "in", inner), (up_name, "in", inner), (down_name, "mid", hidden)):
            calibration.inputs[f"{prefix}.{leaf}"] = moments[expert, key]
            calibration.outputs[f"{prefix}.{leaf}"] = Moment(width)

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, place = torch.where(top_k_index == expert)
            rows = hidden_states[tokens]
            prefix = f"{name}.{expert}"
            moments[expert, "in"].add(rows)
            gate, up = torch.nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            calibration.record(f"{prefix}.{gate_name}", moments[expert, "in"], gate)
            calibration.record(f"{prefix}.{up_name}", moments[expert, "in"], up)
            middle = module.act_fn(gate) * up
            moments[expert, "mid"].add(middle)
            out = torch.nn.functional.linear(middle, module.down_proj[expert])
            calibration.record(f"{prefix}.{down_name}", moments[expert, "mid"], out)
            result = result.index_add(0, tokens, (out * top_k_weights[tokens, place, None]).to(result.dtype))
        return result

    return forward
