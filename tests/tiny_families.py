"""Tiny random models of every family in the converter's table, in the layout that their makers publish.

:mod:`tiny_table` has their configurations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import hand_made
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_configs import HIDDEN
from tiny_models import COMMON, fill, randomize
from tiny_table import TINY

from vllm_milo.offline.families.table import FAMILIES as TABLE


def has_class(name: str) -> bool:
    """Whether transformers can run a family."""
    return not TABLE[name].not_run and _is_known(name)


def has_idle_experts(name: str) -> bool:
    """Whether transformers' class wants weights of experts that have none, and never reads them."""
    return _is_known(name) and any(part.startswith(".experts.") for part in TINY[name].without)


def learns(name: str) -> bool:
    """Whether a family is converted along a text."""
    return has_class(name) and not TABLE[name].not_learned


def _is_known(name: str) -> bool:
    """Whether transformers has a configuration of a family."""
    return (TABLE[name].runs_as or name) in transformers.CONFIG_MAPPING


def _config(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a family's config, with the text model's and its changes at its place."""
    whole = part = deepcopy(dict(TINY[name].around))
    for key in TABLE[name].text_config:
        part = part.setdefault(key, {})
    part |= COMMON | TINY[name].config | changes
    return whole


def _order(key: str) -> tuple[int, str]:
    """Return by what the tensors of a model are sorted so that queries, keys and values follow each other."""
    found = re.search(r"self_attn\.([qkv])_proj", key)
    return ("qkv".index(found[1]) if found else 0, key)


def publish(name: str, folder: Path) -> None:
    """Bring what transformers saved into the layout that the family's makers publish."""
    weights, published = folder / "model.safetensors", {}
    for key, tensor in sorted(load_file(weights).items(), key=lambda item: _order(item[0])):
        fused = TABLE[name].fused_experts(key)
        other = fused is not None and fused.transposed and not fused.lies_transposed(tensor.shape, HIDDEN)
        for pattern, replacement in TINY[name].published:
            key = re.sub(pattern, replacement, key)
        if tensor.dim() == 2 and TABLE[name].fused_experts(key):
            tensor = tensor[None]
        if key in published:  # under one name with others
            tensor = torch.cat([published[key], tensor])
        if not any(part in key for part in TINY[name].without):
            published[key] = tensor.mT.contiguous() if other else tensor
    save_file(published, weights, metadata={"format": "pt"})


def fuse_as_published(name: str, source: Path, folder: Path) -> Path:
    """Bring experts that are stored one by one into the 3-D tensors [E, N, K] of their source, if it has such."""
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in load_file(source / "model.safetensors").items():
        fused = TABLE[name].fused_experts(key)
        if fused is not None and tensor.dim() == 3 and not fused.transposed:
            tensors[key] = torch.stack(
                [
                    fused.joined([tensors.pop(f"{fused.experts}.{expert}.{leaf}.weight") for leaf in fused.projections])
                    for expert in range(len(tensor))
                ]
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_idle_experts(name: str, folder: Path, out: Path) -> Path:
    """Copy a model with zeros for the weights of experts that have none, for transformers' class."""
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in list(tensors.items()):
        if re.search(r"\.experts\.0\.(gate|up)_proj", key):
            tensors |= {key.replace(".experts.0.", part): torch.zeros_like(tensor) for part in TINY[name].without}
    hand_made.copy_settings(folder, out, {})
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def make_family(
    name: str,
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    louder: str | None = None,
    **changes: Any,
) -> Path:
    """Save a tiny random model of a family, with all that its makers' checkpoints have.

    ``changes`` are of the text model's configuration, ``louder`` is instead of the family's own pattern; weights are
    made on ``device``, large ones on a GPU in seconds.
    """
    tiny = TINY[name]
    louder = louder or tiny.louder
    torch.manual_seed(seed)
    if tiny.shapes is None:
        written = _save(name, folder, dtype, device, louder, changes)
    else:
        written = _save_by_shapes(name, folder, dtype, device, louder, changes)
    written = {key: value for key, value in written.items() if key not in tiny.unsaid}
    written |= {"model_type": name, "architectures": [tiny.architecture or written["architectures"][0]]}
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    return folder if _is_known(name) else hand_made.bring_configuration(folder, name)


def _save(
    name: str, folder: Path, dtype: torch.dtype, device: str, louder: str | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Save a model that transformers makes; return what its config.json states."""
    tiny = TINY[name]
    config = transformers.AutoConfig.for_model(tiny.made_of or name, **_config(name, changes))
    found = transformers.AutoModelForMultimodalLM if tiny.around else transformers.AutoModelForCausalLM
    with torch.device(device):
        model = found.from_config(config)
    fill(model)
    for key, parameter in model.named_parameters():
        if louder and re.search(louder, key):
            parameter.data.mul_(8)
    model.to(dtype).save_pretrained(folder)
    publish(name, folder)
    return json.loads((folder / "config.json").read_text())


def _save_by_shapes(
    name: str, folder: Path, dtype: torch.dtype, device: str, louder: str | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Save a model that transformers does not make; return what its config.json states."""
    config, shapes = _config(name, changes), TINY[name].shapes
    assert shapes is not None
    tensors = {}
    for key, shape in shapes(config).items():
        if key.endswith("tid2eid"):  # of a token's experts
            tensors[key] = torch.rand(shape[0], config["n_routed_experts"]).topk(shape[1]).indices
            continue
        tensor = torch.empty(shape, device=device)
        randomize(key, tensor)
        if key == TABLE[name].embedding:
            tensor.normal_()
        elif key.startswith(TABLE[name].head):
            tensor.normal_(std=0.25)
        tensors[key] = (tensor * 8 if louder and re.search(louder, key) else tensor).to(dtype).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config | {"dtype": str(dtype).removeprefix("torch.")}
