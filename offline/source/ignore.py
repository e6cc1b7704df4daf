"""Which matrices of a source model stay unquantized because ``--ignore`` names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.names import FUSED_LAYERS, find_key

from ..errors import ConversionError
from ..nouns import Matrix
from .layers import Layer
from .reader import ModelReader


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


def unknown_modules(reader: ModelReader) -> dict[str, str]:
    """Return the 2-D weights that a family does not know in what looks like a layer: tensors by their modules' names.

    Routers are none of them: the family says that they are never quantized.
    """
    names = ((reader.family.checkpoint_name(tensor), tensor) for layer in reader.layers for tensor in layer.others)
    modules = {
        name.removesuffix(".weight"): tensor
        for name, tensor in names
        if name.endswith(".weight") and ".layers." in name and len(reader.tensors[tensor].shape) == 2
    }
    return {name: tensor for name, tensor in modules.items() if find_key(reader.family.ignore, name) is None}


def refuse_unknown(unknown: Mapping[str, str], ignore: Sequence[str], family: str) -> None:
    """Refuse 2-D weights that the family does not know and ``ignore`` does not name: vLLM would not load them.

    Args:
        unknown: what :func:`unknown_modules` returned.
        ignore: the user's names and patterns.
        family: its name, for the message.

    Raises:
        ConversionError: names the first, and what to do.
    """
    left = {name: tensor for name, tensor in unknown.items() if find_key(ignore, name) is None}
    for name, tensor in left.items():
        top = name.partition(".")[0]
        key = name if top == "model" else rf"re:{top}\..*"
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise ConversionError(
            f"{tensor}{more}: a weight that {family} does not have, which vLLM would refuse to load; leave it out of "
            f"the model's files, or copy it as it is with --ignore '{key}'"
        )


def check_ignore(ignore: Sequence[str], matrices: Sequence[Matrix], unknown: Sequence[str] = ()) -> None:
    """Refuse keys of ``--ignore`` that match nothing, or only some parts of a layer that vLLM fuses.

    Args:
        ignore: what the user wants to keep unquantized.
        matrices: what the family quantizes.
        unknown: modules that the family does not know (:func:`unknown_modules`), which ``ignore`` may name too.

    Raises:
        ConversionError: names the key, or the parts.
    """
    for key in ignore:
        try:
            used = any(find_key([key], name) is not None for name in (*(m.name for m in matrices), *unknown))
        except CheckpointError as error:
            raise ConversionError(f"--ignore {key!r}: {str(error).removeprefix('quantization_config: ')}") from None
        if not used:
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
