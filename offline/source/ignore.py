"""Which matrices of a source model stay unquantized because ``--ignore`` names them.

Routed experts of a layer stay as a whole or not at all, since vLLM computes them together: by the name of their module
(``….mlp.experts``), or where all their matrices are named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.names import FUSED_LAYERS, Keys, find_key

from ..errors import ConversionError
from ..families.family import Family
from ..nouns import Matrix
from .layers import Layer
from .reader import ModelReader


def without_ignored(layer: Layer, ignore: Sequence[str]) -> Layer:
    """Move the matrices that are not to be quantized to the tensors that are copied, each tensor once.

    A tensor that holds matrices of both kinds would be in neither: :func:`check_ignore` refuses that before.
    """
    keys = Keys(ignore)
    ignored = [_is_ignored(source.matrix, keys) for source in layer.matrices]
    kept = [source for source, out in zip(layer.matrices, ignored, strict=True) if not out]
    copied = dict.fromkeys(source.tensor for source, out in zip(layer.matrices, ignored, strict=True) if out)
    return Layer(layer.name, kept, [*layer.others, *copied])


def kept_experts(matrices: Sequence[Matrix], quantized: Sequence[Matrix]) -> list[str]:
    """Return the names of the experts' modules of which no matrix is quantized, in the order of the layers.

    Args:
        matrices: all that the family quantizes.
        quantized: those of them that are not ignored.
    """
    used = {matrix.experts for matrix in quantized}
    return [name for name in dict.fromkeys(m.experts for m in matrices) if name is not None and name not in used]


def _is_ignored(matrix: Matrix, keys: Keys) -> bool:
    """Return whether a matrix or the routed experts that it belongs to are named."""
    return any(name is not None and keys.find(name) is not None for name in (matrix.experts, matrix.name))


def unknown_modules(reader: ModelReader) -> dict[str, str]:
    """Return the 2-D weights that a family does not know in what looks like a layer: tensors by their modules' names.

    What the family keeps is none of them: routers, what predicts further tokens, what is beside the text model.
    """
    names = ((reader.family.checkpoint_name(tensor), tensor) for layer in reader.layers for tensor in layer.others)
    modules = {
        name.removesuffix(".weight"): tensor
        for name, tensor in names
        if name.endswith(".weight") and ".layers." in name and len(reader.tensors[tensor].shape) == 2
    }
    return {name: tensor for name, tensor in modules.items() if find_key(reader.ignore, name) is None}


def refuse_unknown(unknown: Mapping[str, str], ignore: Sequence[str], family: Family) -> None:
    """Refuse 2-D weights that the family does not know and ``ignore`` does not name: vLLM would not load them.

    Args:
        unknown: what :func:`unknown_modules` returned.
        ignore: the user's names and patterns.
        family: of the model.

    Raises:
        ConversionError: names the first, and what to do.
    """
    left = {name: tensor for name, tensor in unknown.items() if find_key(ignore, name) is None}
    for name, tensor in left.items():
        key = name if family.layer_of(name) else rf"re:{name.partition('.')[0]}\..*"
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise ConversionError(
            f"{tensor}{more}: a weight that {family.model_type} does not have, which vLLM would refuse to load; leave "
            f"it out of the model's files, or copy it as it is with --ignore '{key}'"
        )


def check_ignore(ignore: Sequence[str], matrices: Sequence[Matrix], unknown: Sequence[str] = ()) -> None:
    """Refuse keys of ``--ignore`` that match nothing, or only some parts of what vLLM computes as one.

    Args:
        ignore: what the user wants to keep unquantized.
        matrices: what the family quantizes.
        unknown: modules that the family does not know (:func:`unknown_modules`), which ``ignore`` may name too.

    Raises:
        ConversionError: names the key, or the parts.
    """
    names = dict.fromkeys(name for matrix in matrices for name in (matrix.name, matrix.experts) if name is not None)
    for key in ignore:
        try:
            one = Keys([key])
        except CheckpointError as error:
            raise ConversionError(f"--ignore {key!r}: {str(error).removeprefix('quantization_config: ')}") from None
        if all(one.find(name) is None for name in (*names, *unknown)):
            raise ConversionError(f"--ignore {key!r} matches no layer; names look like {_examples(matrices)}")
    keys = Keys(ignore)
    _refuse_parts_of_layers(keys, {matrix.name for matrix in matrices if matrix.experts is None})
    _refuse_parts_of_experts(keys, matrices)


def _examples(matrices: Sequence[Matrix]) -> str:
    """Return a name of each kind that can be ignored by itself: of a linear layer, and of a layer's experts."""
    linear = next((matrix.name for matrix in matrices if matrix.experts is None), None)
    experts = next((matrix.experts for matrix in matrices if matrix.experts is not None), None)
    return " or ".join(repr(name) for name in (linear, experts) if name is not None)


def _refuse_parts_of_layers(keys: Keys, names: set[str]) -> None:
    """Refuse keys that name some of the linear layers that vLLM fuses into one, and not the others."""
    for group in FUSED_LAYERS.values():
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if leaf == group[0]:
                parts = [part for part in (f"{parent}.{leaf}" for leaf in group) if part in names]
                ignored = [part for part in parts if keys.find(part) is not None]
                if ignored and len(ignored) < len(parts):
                    kept = next(part for part in parts if part not in ignored)
                    raise ConversionError(
                        f"--ignore matches {ignored[0]} but not {kept}: vLLM fuses these layers, ignore both"
                    )


def _refuse_parts_of_experts(keys: Keys, matrices: Sequence[Matrix]) -> None:
    """Refuse keys that name some of the matrices of a layer's routed experts, and not the others."""
    by_experts: dict[str, list[str]] = defaultdict(list)
    for matrix in matrices:
        if matrix.experts is not None:
            by_experts[matrix.experts].append(matrix.name)
    for experts, names in by_experts.items():
        if keys.find(experts) is not None:
            continue
        ignored = {name for name in names if keys.find(name) is not None}
        if ignored and len(ignored) < len(names):
            first, other = (next(name for name in names if (name in ignored) is is_in) for is_in in (True, False))
            raise ConversionError(
                f"--ignore matches {first} but not {other}: the routed experts of a layer are kept as a whole; name "
                f"them all with --ignore '{experts}', or none of them"
            )
