"""Watches a model of transformers while it runs: inputs of its linear layers and experts, gradients at the outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..source.family import Family
from .text_moments import Calibration, Moment


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
