"""Which shards of a source a conversion uses, layer after layer, so that none need be there longer than that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..source.layers import Layer, layer_index
from ..source.reader import ModelReader, Uses


def shard_uses(reader: ModelReader, layers: Sequence[Layer], start: int = 0, along_text: bool = False) -> Uses:
    """Return the names of the shards that a conversion uses for each layer, by the layer's name.

    Args:
        reader: the source model.
        layers: of the model, in order.
        start: how many of them are finished.
        along_text: whether a text goes through the model, for which finished layers run once more.
    """
    uses = {layer.name: _files(reader, _tensors(layer)) for layer in layers[start:]}
    if not along_text or all(layer_index(layer.name) is None for layer in layers[start:]):
        return uses
    # a text is begun with the embeddings, also where the layers that it goes through first were quantized before
    begun = [reader.family.embedding]
    again = {
        layer.name: _files(reader, begun if layer_index(layer.name) is None else _tensors(layer))
        for layer in layers[:start]
    }
    return again | uses


def _tensors(layer: Layer) -> list[str]:
    return [*(source.tensor for source in layer.matrices), *layer.others]


def _files(reader: ModelReader, tensors: Iterable[str]) -> list[str]:
    known = (tensor for tensor in tensors if tensor in reader.tensors)
    return sorted({file.name for tensor in known for file in reader.source.view.files(tensor)})
