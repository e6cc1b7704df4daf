"""What transformers makes of a folder, which may be a stranger's: one error of ours, and memory by what files hold.

Settings are looked at before transformers gets them, since it believes what they state: a pipe is waited for, a billion
of layers is allocated. What else it finds wrong it raises as exceptions of any kind.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.shards import LARGEST_JSON, ShardError, read_object
from vllm_milo.values import one_line, shown

from ..errors import ConversionError
from ..families.table import FAMILIES
from .config import read_settings

SETTINGS = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "generation_config.json")
"""Files that must hold a JSON object where they are there."""
_TEXTS = (".json", ".jinja", ".txt", ".model")
_OWN = Path(__file__).resolve().parent.parent
_LEAST_BITS = 3
"""That a weight takes in a file."""


@contextmanager
def transformers_errors(folder: Path, doing: str) -> Iterator[None]:
    """Turn what transformers raises for the files of a folder into one error; out of memory stays what it is.

    Args:
        folder: of the model, for the message.
        doing: what transformers cannot do, as in ``run this model``.

    Raises:
        ConversionError: anything was raised that is no error of ours.
    """
    import transformers

    try:
        yield
    except (ConversionError, CheckpointError, ShardError):
        raise
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"  # of tokenizers, which is written in Rust
        if not isinstance(error, Exception) and not panics:
            raise
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if memory or _raised_here(error):
            raise
        version = transformers.__version__
        raise ConversionError(f"{folder}: transformers {version} cannot {doing}: {one_line(error)}") from error


def _raised_here(error: BaseException) -> bool:
    """Return whether our own code raised an exception, which then is a mistake of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).resolve().is_relative_to(_OWN)


def check_settings(folder: Path) -> None:
    """Refuse a folder with a file that transformers would wait for, or could not read into memory.

    Raises:
        ConversionError: a pipe or a device, or a text larger than any.
        ShardError: settings that are no JSON object.
    """
    try:
        for path in sorted(folder.iterdir()):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ConversionError(f"{path}: is a pipe or a device; remove it")
            if path.suffix in _TEXTS and path.is_file() and path.stat().st_size > LARGEST_JSON:
                raise ConversionError(f"{path}: has more than {LARGEST_JSON // 2**20} MiB; remove it, or copy it again")
    except OSError as error:
        raise ConversionError(f"{folder}: cannot be read: {error.strerror}") from error
    for name in SETTINGS:
        if (folder / name).exists():
            read_object(folder / name)


def load_config(folder: Path) -> Any:
    """Return the config that transformers makes of a folder's config.json.

    Raises:
        ConversionError, ShardError: the file is none, or transformers cannot read it.
    """
    import transformers

    settings = read_settings(folder)
    check_settings(folder)
    family = FAMILIES.get(str(settings.get("model_type")))
    with transformers_errors(folder, "read config.json"):
        if family is None or family.runs_as is None:
            if settings.get("auto_map") and settings.get("model_type") not in transformers.CONFIG_MAPPING:
                raise ConversionError(
                    f"{folder}: transformers {transformers.__version__} has no class for the model type "
                    f"{shown(settings.get('model_type'))}, and code that a model brings along is not run"
                )
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = transformers.AutoConfig.for_model(**{**settings, "model_type": family.runs_as})
        config.architectures = [class_name(config)]
        return config


def class_name(config: Any) -> str:
    """Return the name of transformers' class of language models with such a config; empty where it has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "__name__", ""))


def empty_model(found: Any, config: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Return a model of transformers without weights, on the meta device.

    Args:
        found: its class of transformers, an automatic one or not.
        config: from :func:`load_config`.
        folder: with the model's files.
        dtype: of the weights.

    Raises:
        ConversionError: transformers cannot make it, or it has more weights than the files can hold.
    """
    make = getattr(found, "from_config", None) or found._from_config
    with transformers_errors(folder, "run this model"), torch.device("meta"):
        model = make(config, dtype=dtype).eval()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    weights = sum(parameter.numel() for parameter in model.parameters())
    if size and weights > 8 * size // _LEAST_BITS:
        raise ConversionError(
            f"{folder}: by config.json the model has {weights} weights, more than its files of {size} bytes can hold; "
            f"do they belong together?"
        )
    return model
