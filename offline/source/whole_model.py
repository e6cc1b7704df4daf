"""A source model in memory as a whole, as transformers runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_milo.shards import read_tensors
from vllm_milo.values import shown_name

from ..errors import ConversionError
from ..families.table import FAMILIES
from .config import read_settings
from .foreign import class_name, empty_model, load_config, transformers_errors
from .formats.settings import find_schemes
from .reader import FolderShards, SourceTensors


def model_class(config: Any, folder: Path) -> Any:
    """Return the class of transformers that runs a model, by its config.

    Raises:
        ConversionError: transformers has no class for the architecture.
    """
    import transformers

    names = config.architectures
    name = names[0] if isinstance(names, list) and names else "none"
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    by_type = class_name(config)
    if found is None and by_type.casefold() == str(name).casefold():
        found = getattr(transformers, by_type, None)  # models may write it otherwise, as in PhiMoEForCausalLM
    if not hasattr(found, "from_pretrained") or not hasattr(found, "forward"):
        raise ConversionError(f"{folder}: transformers {transformers.__version__} has no {shown_name(str(name))}")
    return found


def load_source_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the Hugging Face model of a folder in 16 bits or more, in evaluation mode.

    What is stored with fewer bits becomes values on ``device``, a tensor at a time.

    Raises:
        ConversionError: transformers has no class for the architecture, or the model is in a format that is not read.
    """
    config, settings, state = load_config(folder), read_settings(folder), None
    schemes = find_schemes(settings, folder / "config.json")
    if schemes:
        tensors = SourceTensors(settings, schemes, FolderShards(folder))
        state = {name: _Coming(tensors, name, torch.device(device)) for name in tensors.view.tensors}
        del config.quantization_config
    return fill_model(model_class(config, folder), folder, config, state, dtype).to(device).eval()


class _Coming:
    """A tensor that is read when transformers slices it, as it does with those of files."""

    def __init__(self, tensors: SourceTensors, name: str, device: torch.device) -> None:
        self._tensors, self._name, self._device = tensors, name, device

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensors.load(self._name, self._device).cpu()[index]


def fill_model(found: Any, folder: Path, config: Any, state: Mapping[str, Any] | None, dtype: torch.dtype) -> Any:
    """Return a model of transformers with its weights.

    Args:
        found: its class of transformers.
        folder: of the model.
        config: what transformers made of its config.json.
        state: the weights by name, or what gives them when it is sliced; None for those of the folder.
        dtype: of the weights in memory.

    Raises:
        ConversionError: transformers cannot run the model, or the files lack weights of it.
        ShardError: a file of weights is broken.
    """
    empty_model(found, config, folder, dtype)
    if any(folder.glob("*.safetensors")):
        read_tensors(folder)
    place = folder if state is None else None
    with transformers_errors(folder, "load this model"), _without_bars():
        model, said = found.from_pretrained(
            place, config=config, state_dict=state, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    missing = sorted(said["missing_keys"])
    if missing:
        raise ConversionError(f"{folder}: transformers needs {missing[0]}, which the model's files lack")
    family = FAMILIES.get(config.model_type)
    if family is not None and type(model).forward is torch.nn.Module.forward:
        # models that speak generate, and are not called; their part for text is
        model.forward = model.get_submodule(family.head.rpartition(".")[0]).forward
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Let transformers load a model without a progress bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
