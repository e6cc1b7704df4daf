"""The output head of a MiLo checkpoint in vLLM: 8 or 4 bits by vLLM's own weight-only linear kernels."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, PackedvLLMParameter

from vllm_milo import compat
from vllm_milo.head.layout import HEAD_SCALE, HEAD_WORDS, head_groups, head_tensors
from vllm_milo.kernels.integers import WORD, dequantize_integers
from vllm_milo.models.parameters import FillGuard

logger = logging.getLogger("vllm.milo")
_ZERO = "head_zero"
"""What the kernels may call zero points, which symmetric integers have not."""


class MiLoHeadMethod(QuantizeMethodBase):
    """Holds the integers and scales of an output head, and multiplies with them.

    vLLM splits a head by rows, and pads each part: its own loader places the rows, and padding has scales of zero.

    Args:
        bits: 8 or 4.
        prefix: vLLM's name of the head, for messages.
    """

    def __init__(self, bits: int, prefix: str) -> None:
        self.bits, self.prefix = bits, prefix or "lm_head"
        self._plain = UnquantizedEmbeddingMethod()

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
        """Register the parameters of this process's rows, and choose what multiplies with them.

        Raises:
            CheckpointError: the head cannot be stored so, or vLLM has no kernel for it on this GPU.
        """
        rows, k = sum(output_partition_sizes), input_size_per_partition
        groups = head_groups(self.bits, k)
        self.dtype, self.dummy, self.draft = params_dtype, compat.loads_dummy_weights(), compat.is_draft()
        self.guard = FillGuard(self.prefix)
        specs = head_tensors(self.bits, int(layer.org_vocab_size), k)  # type: ignore[arg-type]
        self.guard.expect((f"{self.prefix}.{leaf}", spec) for leaf, spec in specs.items())
        base = extra_weight_attrs["weight_loader"]
        words = PackedvLLMParameter(
            data=torch.zeros(rows, k * self.bits // WORD, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=WORD // self.bits,
            weight_loader=self._loader(HEAD_WORDS, base),
        )
        layer.register_parameter(HEAD_WORDS, words)
        data, loader = torch.zeros(rows, groups, dtype=params_dtype), self._loader(HEAD_SCALE, base)
        scale = (
            ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
            if groups == 1
            else GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        )
        layer.register_parameter(HEAD_SCALE, scale)
        shapes = ((k, output_size), (k, rows))
        chosen = compat.weight_only_kernel(
            self.prefix, self.bits, shapes, -1 if groups == 1 else k // groups, params_dtype
        )
        self.kernel = None if chosen is None else chosen(HEAD_WORDS, HEAD_SCALE, _ZERO)

    def _loader(self, leaf: str, base: Any) -> Any:
        """Return a weight loader that checks a tensor, then hands it to vLLM's, which places the rows."""

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
            if not param.is_meta:  # as where vLLM counts first what a loader copies
                self.guard.fill(f"{self.prefix}.{leaf}", loaded_weight)
            base(param, loaded_weight)

        return load

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that everything was loaded, then bring it into the kernel's layout.

        Raises:
            CheckpointError: a tensor of the head never arrived.
        """
        if not (self.dummy or self.draft):  # a model that drafts for another may get that one's head
            self.guard.check()
        words, scale = getattr(layer, HEAD_WORDS), getattr(layer, HEAD_SCALE)
        if self.kernel is not None:
            self.kernel.process_weights_after_loading(layer)
            if not hasattr(layer, "weight"):  # some kernels give their words this name
                # vLLM asks a head for it where adapters come, and whether a draft model's head is the same
                object.__setattr__(layer, "weight", getattr(layer, HEAD_WORDS).data)
            return
        logger.info("%s: stored in %d bits; on CPUs it is held in %s", self.prefix, self.bits, self.dtype)
        weight = dequantize_integers(words.data, scale.data, self.bits).to(self.dtype)
        for name in (HEAD_WORDS, HEAD_SCALE):
            delattr(layer, name)
        layer.register_parameter("weight", Parameter(weight, requires_grad=False))
        self._plain.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits x·Wᵀ + bias, [T, H] -> [T, V], of this process's rows."""
        if self.kernel is None:
            return self._plain.apply(layer, x, bias)
        return self.kernel.apply_weights(layer, x, bias)
