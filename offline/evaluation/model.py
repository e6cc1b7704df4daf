"""A source model or a MiLo checkpoint as a model of transformers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_milo.names import split_expert_name
from vllm_milo.validation import validate_checkpoint

from ..checkpoint.dequantize import DequantizedTensors
from ..checkpoint.output import is_milo_checkpoint
from ..errors import ConversionError
from ..families.family import Family
from ..families.find import find_family
from ..source.config import read_settings
from ..source.foreign import load_config
from ..source.whole_model import fill_model, load_source_model, model_class


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the Hugging Face model of a folder; MiLo checkpoints get the weights s·(q - z) + UᵀV.

    Raises:
        ConversionError: no such folder, or transformers has no class for the architecture.
        CheckpointError, ShardError: the MiLo checkpoint is broken.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder}: no folder with a config.json; download or convert the model first")
    config = load_config(folder)
    if not is_milo_checkpoint(folder):
        return load_source_model(folder, dtype, device)
    found = model_class(config, folder)
    fmt = validate_checkpoint(folder)
    del config.quantization_config
    state = dict(DequantizedTensors(folder, fmt, dtype).load())
    family = find_family(read_settings(folder))
    if family.only_fused:
        state = _fuse(state, family)
    return fill_model(found, folder, config, state, dtype).to(device).eval()


def _fuse(state: Mapping[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """Return a model's tensors with the experts of each layer in the 3-D tensors that its makers publish.

    Transformers reads some families in no other layout.
    """
    fused: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[tuple[int, int], torch.Tensor]] = defaultdict(dict)
    for name, values in state.items():
        expert = split_expert_name(name.removesuffix(".weight"))
        if expert is None:
            fused[name] = values
            continue
        experts, index, projection = expert
        tensor, part, _ = family.fused_places(experts, projection)[0]
        parts[tensor][index, part] = values
    for tensor, held in parts.items():
        number = 1 + max(index for index, _ in held)
        found = family.fused_experts(tensor)
        assert found is not None, tensor
        parts_of = range(len(found.projections))
        stacked = torch.stack([found.joined([held[index, part] for part in parts_of]) for index in range(number)])
        fused[tensor] = stacked.mT.contiguous() if found.transposed else stacked
    return fused
