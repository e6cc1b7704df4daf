"""MiLo's layers for 16-bit models: matrices become codes and factors as soon as those of some layers are loaded.

The parameters are those of a checkpoint's layer. Beside them stands one for 16-bit weights that holds none: its loader
hands what it is given to the model's gathering, and what comes of it to the others' loaders, so whatever these know of
tensor and expert parallelism is known here too. Each process quantizes whole matrices, so that all hold parts of one
result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEConfig
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.model_executor.utils import set_weight_attrs

from vllm_milo.checkpoint import PACKED, CheckpointError, MiLoFormat
from vllm_milo.fused_moe import MiLoMoEMethod
from vllm_milo.linear import MiLoLinearMethod
from vllm_milo.online.gathering import Gathering

WEIGHT = "weight"
_LEFT = "save the model with transformers' save_pretrained, or convert it first: milo quantize MODEL -o OUT"


@register_weight_loader_v2_supported_method
class OnlineLinearMethod(MiLoLinearMethod):
    """Quantizes one linear layer while it is loaded.

    Args:
        fmt, prefix, parts: as of a checkpoint's layer.
        gathering: of the model.
    """

    def __init__(self, fmt: MiLoFormat, prefix: str, parts: list[str], gathering: Gathering) -> None:
        super().__init__(fmt, prefix, parts)
        self._gathering = gathering

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **options: Any) -> None:
        """Register a checkpoint's parameters, and one without values that takes 16-bit weights."""
        super().create_weights(layer, *sizes, **options)
        k = self.split.k * self.split.row_tp
        for part, rank in enumerate(self.ranks):
            self._gathering.expect(self._piece(part, WEIGHT), rank, self.split.full_width(self.spans[part]) * k)
        nothing = torch.empty(0, dtype=self.dtype)
        layer.register_parameter(WEIGHT, BasevLLMParameter(data=nothing, weight_loader=self._quantizer(layer)))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """See :class:`MiLoLinearMethod`.

        Raises:
            CheckpointError: some of the model's matrices never arrived.
        """
        self._gathering.refuse_incomplete()
        delattr(layer, WEIGHT)
        super().process_weights_after_loading(layer)

    def _quantizer(self, layer: torch.nn.Module) -> Callable[..., None]:
        def load(param: BasevLLMParameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
            _refuse_reload(param, self.prefix)
            part = self._part(shard_id)

            def deliver(tensors: Mapping[str, torch.Tensor]) -> None:
                for tensor, values in tensors.items():
                    target = getattr(layer, tensor)
                    target.weight_loader(target, values, shard_id)

            self._gathering.take(self._piece(part, WEIGHT), loaded_weight, getattr(layer, PACKED).device, deliver)

        return load


class OnlineMoEMethod(MiLoMoEMethod):
    """Quantizes the routed experts of one layer that this process holds, while they are loaded.

    Args:
        fmt, moe, prefix: as of a checkpoint's layer.
        gathering: of the model.
    """

    def __init__(self, fmt: MiLoFormat, moe: FusedMoEConfig, prefix: str, gathering: Gathering) -> None:
        super().__init__(fmt, moe, prefix)
        self._gathering = gathering

    def create_weights(self, layer: Any, *sizes: Any, **options: Any) -> None:
        """Register a checkpoint's parameters, and two without values that take 16-bit weights."""
        if self.moe.has_bias or not self.moe.is_act_and_mul:
            kind = "with biases" if self.moe.has_bias else "without a gate"
            raise CheckpointError(f"{self.prefix}: experts {kind} are not quantized while they are loaded; {_LEFT}")
        super().create_weights(layer, *sizes, **options)
        weights = self.hidden * self.intermediate * self.tp_size
        for shard in self.shard_of.values():
            for expert in self.local.global_ids:
                self._gathering.expect(self._piece(expert, shard, WEIGHT), self._rank(shard, expert), weights)
        for gemm in self.gemms:
            nothing = Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
            set_weight_attrs(nothing, {"weight_loader": self._collector(layer)})
            layer.register_parameter(f"{gemm.name}_{WEIGHT}", nothing)

    def process_weights_after_loading(self, layer: Any) -> None:
        """See :class:`MiLoMoEMethod`.

        Raises:
            CheckpointError: some of the model's matrices never arrived.
        """
        self._gathering.refuse_incomplete()
        for gemm in self.gemms:
            delattr(layer, f"{gemm.name}_{WEIGHT}")
        super().process_weights_after_loading(layer)

    def _collector(self, layer: Any) -> Callable[..., bool | None]:
        def take(
            param: Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int, local: int
        ) -> None:
            _refuse_reload(param, self.prefix)
            if loaded_weight.dim() != 2:
                raise CheckpointError(
                    f"{weight_name}: has shape {list(loaded_weight.shape)}; experts are quantized while they are "
                    f"loaded only from files with a matrix for each; {_LEFT}"
                )
            gemm, _ = self._place(shard_id)

            def deliver(tensors: Mapping[str, torch.Tensor]) -> None:
                for tensor, values in tensors.items():
                    target = getattr(layer, f"{gemm.name}_{tensor}")
                    target.weight_loader(target, values, f"{self.prefix}.{gemm.name}_{tensor}", shard_id, expert_id)

            piece, device = self._piece(expert_id, shard_id, WEIGHT), getattr(layer, f"w13_{PACKED}").device
            self._gathering.take(piece, loaded_weight, device, deliver)

        return self._local_loader(take)

    def _rank(self, shard: str, expert: int) -> int:
        gemm, part = self._place(shard)
        local = self.local.index(expert)
        assert local is not None
        return gemm.ranks[local][part]


def _refuse_reload(param: torch.Tensor, layer: str) -> None:
    """Raise where vLLM loads weights once more, for which it takes layers back to the meta device."""
    if param.is_meta:
        raise CheckpointError(
            f"{layer}: weights that were quantized while they were loaded cannot be loaded once more; start a new "
            f"server, or serve a checkpoint of `milo quantize`"
        )
