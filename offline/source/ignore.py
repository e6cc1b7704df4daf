"""Which matrices of a source model stay unquantized because ``--ignore`` names them."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_milo.checkpoint import find_key
from vllm_milo.names import FUSED_LAYERS

from ..errors import ConversionError
from ..nouns import Matrix
from .layers import Layer


def without_ignored(layer: Layer, ignore: Sequence[str]) -> Layer:
    """Move the matrices that are not to be quantized to the tensors that are copied."""
    kept = [source for source in layer.matrices if find_key(ignore, source.matrix.name) is None]
    dropped = [source for source in layer.matrices if find_key(ignore, source.matrix.name) is not None]
    for source in dropped:
        if source.matrix.experts is not None:
            raise ConversionError(
                f"--ignore matches {source.matrix.name}: routed experts of a layer cannot be left out one by one"
            )
    return Layer(layer.name, kept, layer.others + [source.tensor for source in dropped])


def check_ignore(ignore: Sequence[str], matrices: Sequence[Matrix]) -> None:
    """Refuse keys of ``--ignore`` that match nothing, or only some parts of a layer that vLLM fuses.

    Raises:
        ConversionError: names the key, or the parts.
    """
    for key in ignore:
        if all(find_key([key], matrix.name) is None for matrix in matrices):
            raise ConversionError(f"--ignore {key!r} matches no layer; names look like {matrices[0].name!r}")
    names = {matrix.name for matrix in matrices if matrix.experts is None}
    for group in FUSED_LAYERS.values():
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if leaf == group[0]:
                parts = [part for part in (f"{parent}.{leaf}" for leaf in group) if part in names]
                ignored = [part for part in parts if find_key(ignore, part) is not None]
                if ignored and len(ignored) < len(parts):
                    kept = next(part for part in parts if part not in ignored)
                    raise ConversionError(
                        f"--ignore matches {ignored[0]} but not {kept}: vLLM fuses these layers, ignore both"
                    )
