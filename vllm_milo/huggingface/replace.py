"""Replaces what is quantized in a model of transformers: linear layers, and the modules that hold a layer's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_milo.checkpoint import CheckpointError, MiLoFormat
from vllm_milo.head.layout import head_shape, quantized_heads
from vllm_milo.kernels.reference import ACTIVATIONS, UNGATED_ACTIVATIONS
from vllm_milo.kernels.weights import MoESpec, largest_rank
from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors
from vllm_milo.offline.families.family import Family
from vllm_milo.offline.families.find import find_family
from vllm_milo.shards import TensorEntry, read_tensors
from vllm_milo.validation import (
    count_experts,
    matrix_shape,
    quantized_modules,
    read_format,
    validate_checkpoint,
)

from .modules import MiLoExperts, MiLoHead, MiLoLinear
from .weights import read_experts, read_linear


class _Stored(NamedTuple):
    """What a checkpoint holds: shapes [N, K] of its matrices by name, a quantized head's among them if there is one,
    and numbers of experts by their module."""

    folder: Path
    family: Family
    fmt: MiLoFormat
    shapes: Mapping[str, tuple[int, int]]
    experts: Mapping[str, int]
    heads: Mapping[str, Mapping[str, TensorEntry]]

    def check(self, names: Iterable[str], n: int, k: int) -> None:
        """Raise CheckpointError unless the matrices have the shape [n, k]."""
        for name in names:
            if self.shapes[name] != (n, k):
                raise CheckpointError(
                    f"{self.folder}: {name} is {list(self.shapes[name])}, but by config.json [{n}, {k}]; "
                    f"do the files belong together?"
                )


class _Replacement(NamedTuple):
    """What takes a module's place, the matrices that it holds, and what fills it."""

    module: nn.Module
    matrices: set[str]
    fill: Callable[[DequantizedTensors], None]


def replace_quantized(model: Any, folder: Path) -> Callable[[], None]:
    """Replace the layers of a model that a checkpoint has quantized by empty ones; return what fills them.

    Args:
        model: of transformers, on the meta device.
        folder: the checkpoint.

    Raises:
        CheckpointError, ShardError: the checkpoint is broken, or the model has no place for a matrix of it.
    """
    fmt = validate_checkpoint(folder)
    _, settings = read_format(folder)
    tensors = read_tensors(folder)
    shapes = {name: matrix_shape(found) for name, found in quantized_modules(tensors).items()}
    heads = quantized_heads(tensors)
    every = shapes | {name: head_shape(found, fmt.lm_head_bits) for name, found in heads.items()}
    stored = _Stored(folder, find_family(settings), fmt, every, count_experts(shapes), heads)
    found = {name: _replacement(_called(model, name), module, stored) for name, module in model.named_modules()}
    replacements = {name: replacement for name, replacement in found.items() if replacement is not None}
    missing = set(shapes).difference(*(replacement.matrices for replacement in replacements.values()))
    if missing:
        raise CheckpointError(
            f"{folder}: {type(model).__name__} of transformers has no place for {min(missing)}; upgrade transformers, "
            f"or load it with the class that config.json names, {', '.join(settings.get('architectures') or ['none'])}"
        )
    for name, replacement in replacements.items():
        model.set_submodule(name, replacement.module)

    def fill_all() -> None:
        tensors = DequantizedTensors(folder, fmt, torch.float32, model.device)
        for replacement in replacements.values():
            replacement.fill(tensors)

    return fill_all


def _called(model: Any, name: str) -> str:
    """Return the name of a module in a whole model, of which ``model`` may be the part without a head."""
    return f"{model.base_model_prefix}.{name}" if model.base_model is model else name


def _replacement(name: str, module: nn.Module, stored: _Stored) -> _Replacement | None:
    """Return what takes the place of a module by its name in a whole model; None for what stays.

    Raises:
        CheckpointError: the checkpoint's matrices have other shapes, or the module is of a kind that is not supported.
    """
    called = stored.family.checkpoint_name(f"{name}.weight").removesuffix(".weight")
    if isinstance(module, nn.Linear) and called in stored.shapes:
        stored.check([called], module.out_features, module.in_features)
        if called in stored.heads:
            head = MiLoHead(module)
            return _Replacement(head, {called}, partial(_fill_head, head, called))
        linear = MiLoLinear(module)
        return _Replacement(linear, {called}, partial(_fill_linear, linear, called, stored.fmt))
    leaves = stored.family.leaves_in_memory
    fused = stored.family.fused_experts(f"{name}.{leaves[0]}")
    if fused is None or fused.experts not in stored.experts:
        return None
    if not hasattr(module, "act_fn"):
        raise CheckpointError(
            f"{name}: MiLo does not run experts of {type(module).__name__} in transformers, which has biases or an "
            f"activation of its own; serve the checkpoint with vLLM"
        )
    number, projections = stored.experts[fused.experts], (fused.projections, (stored.family.projections.down,))
    gemms = [
        [[f"{fused.experts}.{index}.{part}" for part in parts] for index in range(number)] for parts in projections
    ]
    for gemm, leaf in zip(gemms, leaves, strict=True):
        count, *sides = module.get_parameter(leaf).shape
        n, k = reversed(sides) if fused.in_memory else sides
        stored.check(_flat(gemm), n // len(gemm[0]), k)
        if count != number:
            raise CheckpointError(
                f"{stored.folder}: {fused.experts} holds {number} experts, but by config.json {count}"
            )
    experts, activation = MiLoExperts(), _activation(name, module, len(fused.projections) == 2)
    held = {name for gemm in gemms for name in _flat(gemm)}
    return _Replacement(experts, held, partial(_fill_experts, experts, gemms, stored.fmt, activation))


def _flat(gemm: list[list[str]]) -> list[str]:
    return [name for parts in gemm for name in parts]


def _fill_head(head: MiLoHead, name: str, tensors: DequantizedTensors) -> None:
    head.fill(tensors.head(name))


def _fill_linear(linear: MiLoLinear, name: str, fmt: MiLoFormat, tensors: DequantizedTensors) -> None:
    linear.fill(*read_linear(tensors, name, fmt))


def _fill_experts(
    experts: MiLoExperts, gemms: list[list[list[str]]], fmt: MiLoFormat, activation: str, tensors: DequantizedTensors
) -> None:
    (w13, ranks13), (w2, ranks2) = (read_experts(tensors, names, fmt) for names in gemms)
    spec = MoESpec(fmt.compensator.bits, activation, False, [largest_rank(ranks13), largest_rank(ranks2)])
    experts.fill(w13, w2, spec)


def _activation(name: str, module: Any, gated: bool) -> str:
    """Return what the operators call the activation of a module of experts: layers and functions differ by family.

    Args:
        name: of the module, for messages.
        module: of transformers.
        gated: whether its experts have a gate.

    Raises:
        CheckpointError: they do not know it.
    """
    values = torch.linspace(-4, 4, 65, device="cpu")
    found = module.act_fn(values)
    functions = ACTIVATIONS if gated else UNGATED_ACTIVATIONS
    for known, function in functions.items():
        if torch.allclose(found, function(values), atol=1e-5):
            return known
    raise CheckpointError(
        f"{name}: MiLo does not support the activation {type(module.act_fn).__name__} (known are "
        f"{', '.join(functions)}); use the unquantized model"
    )
