"""The output head in the plan of a conversion: whether it can be quantized, and what it becomes."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_milo.head.layout import PLAIN_BITS, head_tensors
from vllm_milo.shards import TensorEntry

from ..errors import ConversionError
from ..source.reader import ModelReader

_SPEC = Mapping[str, tuple[str, tuple[int, ...]]]


def refuse_no_head(reader: ModelReader, bits: int) -> None:
    """Refuse to quantize a head that is not a matrix of its own.

    One that is tied to the embeddings is looked up too, by tokens, and no quantized layer of vLLM does that.

    Raises:
        ConversionError: says why.
    """
    if bits == PLAIN_BITS:
        return
    if reader.config.get("tie_word_embeddings", reader.whole_config.get("tie_word_embeddings")):
        raise ConversionError(
            f"{reader.folder}: --lm-head-bits {bits}: config.json ties the output head to the embeddings "
            f"(tie_word_embeddings), so there is none to quantize; leave the option out"
        )
    name = f"{reader.family.head}.weight"
    if name not in reader.tensors or len(reader.tensors[name].shape) != 2:
        raise ConversionError(
            f"{reader.folder}: --lm-head-bits {bits}: the model has no matrix {name}; leave the option out"
        )


def stored_as(reader: ModelReader, name: str, entry: TensorEntry, bits: int) -> _SPEC:
    """Return dtype and shape of what a tensor becomes that is in no quantized matrix, by name: itself, but for a head.

    Args:
        reader: the source model.
        name: of the tensor in checkpoints.
        entry: what the source has.
        bits: of the head.

    Raises:
        CheckpointError: the head's rows are of a size that is not stored.
    """
    if bits == PLAIN_BITS or name != f"{reader.family.head}.weight":
        return {name: (entry.dtype, entry.shape)}
    n, k = entry.shape
    return {f"{reader.family.head}.{leaf}": spec for leaf, spec in head_tensors(bits, n, k).items()}
