"""The headers of a source model as those of a model in 16 bits, whatever its matrices are stored as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_milo.dtypes import DTYPES
from vllm_milo.names import Keys
from vllm_milo.shards import TensorEntry

from ...errors import ConversionError
from ..layers import BROKEN
from .encoding import Encoding, Place
from .fused import FusedEncoding, fused_modules
from .scheme import Format, Scheme
from .table import IGNORED, MXFP4_EXPERTS

Tensors = Mapping[str, TensorEntry]
WEIGHT = "weight"
"""Last part of the name that a matrix has for all who read it."""


class PlainView(NamedTuple):
    """A model's tensors as if it were in 16 bits.

    Attributes:
        tensors: by name; those of a matrix are one, in the model's dtype, with the file that holds most of it.
        encodings: of the matrices that are stored with fewer bits, by the same names.
        format: what the matrices are stored as, for people; None where all are in 16 bits or more.
        notes: what the user should know.
    """

    tensors: Tensors
    encodings: Mapping[str, Encoding | FusedEncoding]
    format: str | None = None
    notes: Sequence[str] = ()

    def files(self, tensor: str) -> set[Path]:
        """Return the files that a tensor takes."""
        encoding = self.encodings.get(tensor)
        return {self.tensors[tensor].file} if encoding is None else {place.file for place in encoding.places.values()}


def view_plain(stored: Tensors, schemes: Sequence[Scheme], dtype: str) -> PlainView:
    """Return a model's tensors as if it were in 16 bits.

    Args:
        stored: as headers have them.
        schemes: how matrices may be stored; none where all are in 16 bits or more.
        dtype: of the model, by safetensors' name.

    Raises:
        ConversionError: a tensor of a matrix is missing, or has another shape or dtype; names the file and the tensor.
    """
    if not schemes:
        return PlainView(stored, {})
    if schemes[0].format is MXFP4_EXPERTS:
        return _view_fused(stored, schemes[0], dtype)
    choose = _Choice(schemes)
    encodings: dict[str, Encoding | FusedEncoding] = {}
    tensors, used, ignored = {}, set(), Counter[str]()
    for module, scheme in _encoded_modules(stored, schemes, choose):
        name, encoding = f"{module}.{WEIGHT}", _encoding(stored, module, scheme, dtype)
        codes = encoding.places[scheme.format.codes]
        if name in stored and codes.tensor != name:
            raise ConversionError(f"{codes}: the matrix is there twice, as {name} too; {BROKEN}")
        tensors[name], encodings[name] = TensorEntry(codes.file, dtype, encoding.shape), encoding
        used |= {place.tensor for place in encoding.places.values()}
    belonging = {leaf for scheme in schemes for leaf in scheme.format.leaves} - {WEIGHT}
    for name, entry in stored.items():
        module, _, leaf = name.rpartition(".")
        if name in used:
            continue
        if leaf in IGNORED:
            ignored[leaf] += 1
        elif leaf in belonging:
            raise _without_codes(stored, name, schemes, choose(module))
        else:
            tensors[name] = entry
    notes = [f"{count} tensors {leaf} are left out: {IGNORED[leaf]}" for leaf, count in sorted(ignored.items())]
    names = sorted({scheme.name for scheme in {encoding.scheme for encoding in encodings.values()}})
    return PlainView(tensors, encodings, "; ".join(names) or None, notes)


def _view_fused(stored: Tensors, scheme: Scheme, dtype: str) -> PlainView:
    """Return the tensors of a model whose experts are stored together."""
    found = list(fused_modules(stored, scheme, dtype))
    encodings = {name: encoding for name, _, encoding in found}
    used = {place.tensor for encoding in encodings.values() for place in encoding.places.values()}
    tensors = {name: entry for name, entry in stored.items() if name not in used}
    twice = next((name for name in encodings if name in tensors), None)
    if twice is not None:
        raise ConversionError(f"{tensors[twice].file}: tensor {twice} is there twice, in MXFP4 too; {BROKEN}")
    entries = {name: entry for name, entry, _ in found}
    return PlainView(tensors | entries, encodings, scheme.name if found else None)


class _Choice:
    """Which of a model's schemes a module has: that of its exact name, of a pattern, or of all linear layers."""

    def __init__(self, schemes: Sequence[Scheme]) -> None:
        self._schemes = schemes
        # compressed-tensors matches the beginning of a name, these tables the whole
        whole = {t: f"re:({t[3:]}).*" if t.startswith("re:") else t for scheme in schemes for t in scheme.targets}
        self._targets = {whole[target]: scheme for scheme in reversed(schemes) for target in scheme.targets}
        self._keys = Keys(self._targets) if len(schemes) > 1 else None

    def __call__(self, module: str) -> Scheme | None:
        if self._keys is None:
            return self._schemes[0]
        key = self._keys.find(module)
        return self._targets.get("Linear" if key is None else key)


def _encoded_modules(stored: Tensors, schemes: Sequence[Scheme], choose: _Choice) -> Iterator[tuple[str, Scheme]]:
    """Yield the modules whose weights are in a format's tensor and dtype."""
    kinds = {(scheme.format.codes, dtype) for scheme in schemes for dtype in scheme.format.dtypes}
    for name, entry in stored.items():
        module, _, leaf = name.rpartition(".")
        if (leaf, entry.dtype) not in kinds:
            continue
        scheme = choose(module)
        if scheme is None or scheme.format.codes != leaf or entry.dtype not in scheme.format.dtypes:
            expected = "none" if scheme is None else scheme.name
            raise ConversionError(
                f"{entry.file}: tensor {name} is {entry.dtype}, but by config.json the format of its module is "
                f"{expected}; do they belong together?"
            )
        yield module, scheme


def _encoding(stored: Tensors, module: str, scheme: Scheme, dtype: str) -> Encoding:
    """Return how a module's matrix is stored, after checking what headers tell of its tensors."""
    how = scheme.format
    codes = _entry(stored, f"{module}.{how.codes}", scheme)
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise ConversionError(
            f"{codes.file}: tensor {module}.{how.codes} must have 2 dimensions, found {list(codes.shape)}; {BROKEN}"
        )
    n, k = codes.shape[0], codes.shape[1] * scheme.per_code(codes.dtype)
    rows, columns = scheme.scales(n, k)
    scales = [(rows, columns), *([(), (1,)] if rows * columns == 1 else [])]
    needed: dict[str, tuple[tuple[str, ...], list[tuple[int, ...]]]] = {how.scale: (how.scale_dtypes, scales)}
    if how.shape is not None:
        needed[how.shape] = (("I32", "I64"), [(2,)])
    if how.zero is not None and not scheme.symmetric:
        needed[how.zero] = (how.dtypes, [(-(-n // scheme.per_code(codes.dtype)), columns)])
    if how.order is not None and f"{module}.{how.order}" in stored:
        needed[how.order] = (("I32", "I64"), [(k,)])
    places = {how.codes: Place(codes.file, f"{module}.{how.codes}")}
    for leaf, (dtypes, shapes) in needed.items():
        name = f"{module}.{leaf}"
        entry = _entry(stored, name, scheme)
        if entry.dtype not in dtypes or entry.shape not in shapes:
            raise ConversionError(
                f"{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)}, but of {n}x{k} weights "
                f"({scheme.name}) it must be {' or '.join(dtypes)} {list(shapes[0])}; {BROKEN}"
            )
        places[leaf] = Place(entry.file, name)
    return Encoding(scheme, (n, k), DTYPES[dtype].torch_name, places)


def _entry(stored: Tensors, name: str, scheme: Scheme) -> TensorEntry:
    if name not in stored:
        raise ConversionError(
            f"{name}: missing, and by config.json the format of its module is {scheme.name}; are the model's files "
            f"complete?"
        )
    return stored[name]


def _without_codes(stored: Tensors, name: str, schemes: Sequence[Scheme], scheme: Scheme | None) -> ConversionError:
    """Return the error for a tensor that belongs to no matrix, such as a scale whose weights are in 16 bits."""
    module, _, leaf = name.rpartition(".")
    how: Format = next(one.format for one in schemes if leaf in one.format.leaves) if scheme is None else scheme.format
    codes = stored.get(f"{module}.{how.codes}")
    there = "missing" if codes is None else codes.dtype
    return ConversionError(
        f"{stored[name].file}: tensor {name} belongs to no matrix as config.json describes them ({how.name}"
        f"{': no zero points' if leaf == how.zero else ''}): {module}.{how.codes} is {there}; {BROKEN}"
    )
