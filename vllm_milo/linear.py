"""``MiLoLinearMethod``: attention, shared-expert and dense FFN layers in 3 bits plus compensators.

Where the device has room they are loaded as such, and then kept in 16 bits, compensators added (:mod:`.loading.dense`).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BasevLLMParameter, GroupQuantScaleParameter, PackedvLLMParameter

from vllm_milo import compat
from vllm_milo.checkpoint import (
    BASE_TENSORS,
    FACTOR_TENSORS,
    PACKED,
    SCALE,
    U_SCALE,
    V_SCALE,
    ZERO,
    CheckpointError,
    MiLoFormat,
    U,
    V,
    packed_words,
)
from vllm_milo.kernels import ops
from vllm_milo.kernels.warm_up import Waiting, wait, warm_up_linear, warm_up_wide
from vllm_milo.kernels.weights import LinearSpec, LinearWeights, offsets
from vllm_milo.loading import account, dense
from vllm_milo.loading.ahead import start_linear
from vllm_milo.models.parameters import ANY_FLOAT, Cut, FillGuard, factor_dtype, require_split
from vllm_milo.models.partitions import Split, keep_unquantized, spans_of

_Loader = Callable[..., None]


@register_weight_loader_v2_supported_method
class MiLoLinearMethod(LinearMethodBase):
    """Creates, loads and applies one linear layer of a MiLo checkpoint.

    Args:
        fmt: the checkpoint contract.
        prefix: vLLM's name of the layer.
        parts: checkpoint names of the matrices it holds, in order; one that it holds twice stands there twice.

    Raises:
        CheckpointError: the matrices differ in group size.
    """

    def __init__(self, fmt: MiLoFormat, prefix: str, parts: list[str]) -> None:
        self.format = fmt
        self.prefix = prefix
        self.parts = parts
        self.ranks = [fmt.ranks.of_module(part) for part in parts]
        self.group_size = fmt.fused_group_size(parts)

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register this rank's share of codes, scales, zero points and factors.

        Raises:
            CheckpointError: the layer's sizes, or its split over ranks, do not fit the format.
        """
        self.split = Split(layer, input_size_per_partition, output_partition_sizes, input_size, output_size)
        self.spans = spans_of(self.prefix, self.parts, len(output_partition_sizes))
        widths = [sum(output_partition_sizes[partition] for partition in span) for span in self.spans]
        self.spec = LinearSpec(widths, self.ranks, self.group_size, self.format.compensator.bits)
        self._check_sizes(input_size)
        self.dummy = compat.loads_dummy_weights()
        self.dtype, self.max_tokens = params_dtype, compat.max_tokens()
        self.guard = FillGuard(self.prefix)
        for part, rank in enumerate(self.ranks):
            n = self.split.full_width(self.spans[part])
            specs = self.format.base_tensors(n, input_size, self.group_size)
            specs |= self.format.factor_tensors(n, input_size, rank, ANY_FLOAT)
            self.guard.expect((self._piece(part, tensor), spec) for tensor, spec in specs.items())
        loader = extra_weight_attrs["weight_loader"]
        self._register_base(layer, sum(widths), input_size_per_partition, loader)
        self._register_factors(layer, input_size_per_partition, params_dtype)
        device = getattr(layer, PACKED).device
        self.place = dense.reserve(self.prefix, sum(widths), self.split.k, device, params_dtype)
        wide, in_codes = self.place is not None, self.place is not None and self.place.in_codes
        self.kernels = start_linear(self.spec, self.split.k, params_dtype, self.max_tokens, device, wide, in_codes)
        account.make(self.prefix)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that everything was loaded, then bring it into the backend's layout.

        Raises:
            CheckpointError: a tensor of this layer never arrived.
        """
        if not self.dummy:
            self.guard.check()
        device = getattr(layer, PACKED).device
        self.backend = ops.choose_backend("linear", device.type)
        load = account.current()
        self.wide = self.place is not None and self.place.keep(device)
        with load.spend(account.WARMING_UP):
            wait(self.kernels)
        with load.spend(account.REPACKING):
            prepared = self._repack(layer)
        if self.place is not None and self.wide:
            load.widen(self.prefix, self.place.size, self.place.in_codes, self.place.dropped)
        self._warm_up(prepared, getattr(layer, "bias", None) is not None)
        account.finish(self.prefix, device)

    def _warm_up(self, prepared: list[torch.Tensor], biased: bool) -> Waiting:
        """Begin to compile what start_linear did not foresee."""
        if not self.wide:
            return warm_up_linear(prepared, self.spec, self.backend, self.split.k, self.dtype, self.max_tokens)
        if self.backend == "torch" or not biased:
            return []
        n, k = prepared[0].shape
        return warm_up_wide(n, k, self.dtype, True, len(prepared) > 1, prepared[0].device)

    def _repack(self, layer: torch.nn.Module) -> list[torch.Tensor]:
        """Replace the layer's parameters by the backend's, or by weights in 16 bits and 8, and return those."""
        weights = LinearWeights(*(getattr(layer, name).data for name in BASE_TENSORS + _FACTOR_ORDER))
        if self.place is not None and self.wide:
            prepared = self._widen(weights, self.place)
        else:
            prepared = ops.prepare_linear(weights, self.spec, self.backend)
        for name in BASE_TENSORS + _FACTOR_ORDER:
            delattr(layer, name)
        # the first keeps its name: MLA and LoRA look for weight_packed
        self.names = [PACKED, *(f"milo_{index}" for index in range(1, len(prepared)))]
        for name, tensor in zip(self.names, prepared, strict=True):
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        return prepared

    def _widen(self, weights: LinearWeights, place: dense.Place) -> list[torch.Tensor]:
        """Return the layer in 16 bits, compensators added, and in 8 where it has room and they are close enough."""
        wide = ops.expand_linear(weights, self.spec, self.dtype, self.backend)
        if not place.in_codes:
            return [wide]
        codes, error = ops.encode_linear(wide)
        return [wide, *codes] if place.keep_codes(sum(part.nbytes for part in codes), error) else [wide]

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x·Wᵀ + (x·Vᵀ)·U + bias."""
        weights = [getattr(layer, name) for name in self.names]
        if self.wide:
            return ops.wide_linear(x, weights, bias, self.backend)
        out = ops.linear(x, weights, self.spec, self.backend)
        return out if bias is None else out + bias

    def _check_sizes(self, input_size: int) -> None:
        split, cuts = self.split, []
        for name, rank, span in zip(self.parts, self.ranks, self.spans, strict=True):
            self.format.check_matrix(name, split.full_width(span), input_size, self.group_size)
            of_n, of_k = self.format.compensator.split_multiples(self.group_size, rank > 0)
            if split.row_tp > 1:
                cuts.append(Cut(name, "input size", input_size, of_k))
            for partition in span if split.column_tp > 1 else ():
                width = split.full_width(range(partition, partition + 1))
                cuts.append(Cut(name, "output size", width, of_n, split.most_parts(partition)))
        require_split(cuts, max(split.column_tp, split.row_tp))

    def _register_base(self, layer: torch.nn.Module, n: int, k: int, loader: _Loader) -> None:
        dims: dict[str, Any] = {"input_dim": 1, "output_dim": 0}
        packed = PackedvLLMParameter(
            data=torch.empty(n, packed_words(k), dtype=torch.int32),
            packed_dim=1,
            packed_factor=Fraction(32, 3),
            weight_loader=self._loader(PACKED, loader),
            **dims,
        )
        layer.register_parameter(PACKED, packed)
        for name in (SCALE, ZERO):
            groups = torch.empty(n, k // self.group_size, dtype=torch.float16)
            parameter = GroupQuantScaleParameter(data=groups, weight_loader=self._loader(name, loader), **dims)
            layer.register_parameter(name, parameter)

    def _register_factors(self, layer: torch.nn.Module, k: int, params_dtype: torch.dtype) -> None:
        for name, shape in self._factor_shapes(k).items():
            dtype = factor_dtype(name, self.format.compensator, params_dtype)
            data = torch.empty(shape, dtype=dtype)
            layer.register_parameter(name, BasevLLMParameter(data=data, weight_loader=self._loader(name)))

    def _factor_shapes(self, k: int) -> dict[str, tuple[int, ...]]:
        """Return this rank's shapes: U and its scales 1-D, since parts differ in width; V in rows."""
        compensator = self.format.compensator
        total = sum(self.ranks)
        u = [rank * compensator.row(n, "")[1] for rank, n in zip(self.ranks, self.spec.widths, strict=True)]
        scales = [rank * (n // compensator.group_size) for rank, n in zip(self.ranks, self.spec.widths, strict=True)]
        shapes: dict[str, tuple[int, ...]] = {
            U: (sum(u),),
            U_SCALE: (sum(scales),),
            V: (total, compensator.row(k, "")[1]),
            V_SCALE: (total, k // compensator.group_size),
        }
        self.u_starts = {U: offsets(u), U_SCALE: offsets(scales)}
        if not compensator.quantized:
            shapes |= {U_SCALE: (0,), V_SCALE: (0, 0)}
        return shapes

    def _loader(self, tensor: str, base: _Loader | None = None) -> _Loader:
        """Return a weight loader that checks a tensor, then hands it to vLLM's or cuts the factor itself."""

        def load(param: BasevLLMParameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
            part = self._part(shard_id)
            if not param.is_meta:  # as where vLLM counts first what a loader copies
                self.guard.fill(self._piece(part, tensor), loaded_weight)
            if base is None:
                self._load_factor(param, loaded_weight, tensor, part)
            elif shard_id is None and self.split.only:
                base(param, loaded_weight)
            else:
                for partition, rows in self.split.rows(self.spans[part]):
                    base(param, loaded_weight[rows], self.split.shard_id(partition))
            account.current().arrive()

        return load

    def _piece(self, part: int, tensor: str) -> str:
        """Return the guard's name of a tensor of a part, which tells apart parts of the same matrix."""
        name = self.parts[part]
        return f"{name}.{tensor}" + (" (once more)" if name in self.parts[:part] else "")

    def _load_factor(self, param: BasevLLMParameter, loaded: torch.Tensor, tensor: str, part: int) -> None:
        compensator, is_scale = self.format.compensator, tensor in (U_SCALE, V_SCALE)
        if tensor in (U, U_SCALE):
            cuts = self.split.output_slices(self.spans[part], param.tp_rank)
            starts = self.u_starts[tensor]
            target = param.data[starts[part] : starts[part + 1]].view(self.ranks[part], -1)
        else:
            cuts = [self.split.input_slice(param.tp_rank)]
            rows = offsets(self.ranks)
            target = param.data[rows[part] : rows[part + 1]]
        # one after another: putting them together first would take all of the host's threads, which may be busy
        column = 0
        for cut in cuts:
            elements = cut.elements(compensator, loaded, is_scale)
            target[:, column : column + elements.shape[1]].copy_(elements)
            column += elements.shape[1]

    def _part(self, shard_id: Any) -> int:
        """Return which part a tensor is, by the partitions that vLLM means it for."""
        span = self.split.span(shard_id)
        if span not in self.spans:
            raise CheckpointError(
                f"{self.prefix}: MiLo expects the tensors {self.parts} here, but vLLM loads one for partitions "
                f"{list(span)} of {len(self.split.widths)}; {keep_unquantized(self.prefix, self.parts)}"
            )
        return self.spans.index(span)


_FACTOR_ORDER = (U, U_SCALE, V, V_SCALE)
assert set(_FACTOR_ORDER) == set(FACTOR_TENSORS)
