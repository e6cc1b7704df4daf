"""What decides a conversion's result: a conversion goes on only with layers of the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .conversion import Conversion, Text
from .durable.journal import START_OVER
from .errors import ConversionError
from .hub_names import hub_origin
from .source.reader import ModelReader

BATCH_WEIGHTS = "batch_weights"
"""Names the most weights that the solver got at once, which a conversion that goes on keeps to."""


def fingerprint(
    reader: ModelReader, conversion: Conversion, recipe: Mapping[str, Any], batch_weights: int
) -> dict[str, Any]:
    """Return what decides a conversion's result, as JSON.

    The weights count by their files' names, sizes, times of change and headers, not by their content, which takes long
    to read; those of the Hub by their commit, whether they are in its cache or come when they are used. The kind of
    device counts, not its model: on another GPU the rest is converted as this one does it.

    Args:
        reader: the source model.
        conversion: what is done with it.
        recipe: what the checkpoint records of that, the version among it.
        batch_weights: most weights that the solver gets at once.
    """
    content = {
        "recipe": dict(recipe),
        "ignore": list(conversion.ignore),
        "expert_counts": _digest(json.dumps(dict(conversion.expert_counts), sort_keys=True).encode()),
        "device": torch.device(conversion.device).type,
        BATCH_WEIGHTS: batch_weights,
        "shard_bytes": conversion.shard_bytes,
        "text": None if conversion.text is None else _text(conversion.text),
        "source": {"config.json": _digest((reader.folder / "config.json").read_bytes()), **_weights(reader)},
    }
    return json.loads(json.dumps(content))


def refuse_other_layers(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with the finished layers of another conversion.

    Args:
        folder: where they are.
        before: their fingerprint.
        now: of the conversion that would go on.

    Raises:
        ConversionError: the two differ, in what and what to do.
    """
    was, is_ = dict(_flat(before)), dict(_flat(now))
    names = [name for name in was | is_ if was.get(name) != is_.get(name)]
    if not names:
        return
    different = [f"{name} was {_short(was.get(name))} and is {_short(is_.get(name))}" for name in names[:5]]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise ConversionError(
        f"the finished layers in {folder} are of another conversion: {'; '.join(different)}{more}. Convert as before, "
        f"or {START_OVER}"
    )


def _text(text: Text) -> dict[str, Any]:
    return {
        "windows": list(text.windows.shape),
        "tokens": _digest(text.windows.contiguous().numpy().tobytes()),
        "learn": asdict(text.learn),
        "tune": None if text.tune is None else asdict(text.tune),
    }


def _weights(reader: ModelReader) -> dict[str, Any]:
    origin = hub_origin(reader.folder)
    if origin is not None:
        return dict(zip(("repository", "commit"), origin, strict=True))
    return {path.name: _shard(path) for path in sorted({entry.file for entry in reader.shards.tensors.values()})}


def _shard(path: Path) -> dict[str, Any]:
    status = path.stat()
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return {"size": status.st_size, "changed": status.st_mtime_ns, "header": _digest(header)}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield prefix + name, value


def _short(value: Any) -> str:
    return "absent" if value is None else str(value)
