"""``MiLoConfig``: reads the checkpoint contract and hands vLLM the methods of its layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_milo import compat
from vllm_milo.checkpoint import QUANT_METHOD, CheckpointError, GroupTable, MiLoFormat, RankTable
from vllm_milo.head.layout import HEAD_TENSORS, PLAIN_BITS
from vllm_milo.models.checkpoint_names import (
    experts_in_checkpoint,
    module_in_checkpoint,
    name_in_model,
    names_in_checkpoint,
    values_of_keys,
)
from vllm_milo.models.completeness import check_loaded
from vllm_milo.models.refused import refuse_permuted
from vllm_milo.names import FUSED_LAYERS, ROUTERS, leaf_of, split_expert_name
from vllm_milo.online.options import OnlineOptions
from vllm_milo.shards import TensorEntry, read_tensors
from vllm_milo.validation import experts_of, is_fused_experts, modules_of, validate_checkpoint

if TYPE_CHECKING:
    from vllm_milo.fused_moe import MiLoMoEMethod
    from vllm_milo.online.gathering import Gathering

logger = logging.getLogger("vllm.milo")
_WHILE_LOADED = (
    "MiLo quantizes %s while it is loaded, without data, to %g bits a weight; `milo quantize %s -o OUT` makes a "
    "checkpoint that learned along a text, which leaves about half the divergence, and that loads faster"
)
_HEADS = ("lm_head", "")
"""What vLLM's models call their output head, the last part of the name; some give it none."""
_WEIGHT_NORM = {".parametrizations.weight.original1": ".weight_v"}


class MiLoConfig(QuantizationConfig):
    """The ``quantization_config`` of a MiLo checkpoint, as vLLM wants it; or of a model that becomes one at load.

    Args:
        fmt: the checked contract; None, as vLLM says it, for a model whose config.json has none.
        options: of a model that is quantized while it is loaded.
    """

    def __init__(self, fmt: MiLoFormat | None = None, options: OnlineOptions | None = None) -> None:
        super().__init__()
        self.format = fmt or MiLoFormat()
        self._online: OnlineOptions | None = options or OnlineOptions() if fmt is None else None
        self._gathering: Gathering | None = None
        self._mappers: list[Any] = []
        self._stored_experts: set[str] = set()
        self._stored_modules: set[str] = set()
        self._diverted: dict[str, tuple[Any, MiLoMoEMethod]] = {}
        self._head_awaited = self._has_head = False

    def __repr__(self) -> str:
        fmt = self.format
        mixed = ", group_sizes=…" if fmt.groups else ""
        return f"MiLoConfig(bits=3, group_size={fmt.group_size}{mixed}, compensator_bits={fmt.compensator.bits})"

    def get_name(self) -> Any:
        """Return the method's name."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the activation dtypes; float32 is for CPUs."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return compute capability 8.0: the first with bf16 tensor cores."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: the contract stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MiLoConfig:
        """Read the ``quantization_config`` of config.json.

        Raises:
            CheckpointError: the contract is broken or of a newer version.
        """
        return cls(MiLoFormat.from_dict(config))

    @classmethod
    def from_config_dict_json(cls, text: str) -> MiLoConfig:
        """Read how a model is quantized while it is loaded, from vLLM's ``--hf-overrides``.

        Raises:
            CheckpointError: the options are not known.
        """
        return cls(options=OnlineOptions.from_json(text))

    def maybe_update_config(self, model_name: str, *_: Any, revision: str | None = None, **__: Any) -> None:
        """Check a local checkpoint's files before anything is allocated, or decide what a model is quantized to.

        Raises:
            CheckpointError, ShardError: a tensor is missing, extra or wrong, or of a kind that this version of vLLM
                does not load, or a file is truncated.
            ConversionError: the model has no contract and cannot be quantized.
        """
        if self._online is not None:
            self._plan_online(model_name, revision, self._online)
            return
        folder = Path(model_name)
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            validate_checkpoint(folder)
            tensors = read_tensors(folder)
            _refuse_fused_experts(folder, tensors)
            self._stored_experts, self._stored_modules = experts_of(tensors), modules_of(tensors)

    def _plan_online(self, model_name: str, revision: str | None, options: OnlineOptions) -> None:
        from vllm_milo.online.gathering import Gathering
        from vllm_milo.online.plan import find_files, plan_online

        plan = plan_online(find_files(model_name, revision), options)
        self.format, self._gathering = plan.format, Gathering(plan.recipe)
        self._stored_experts, self._stored_modules = set(plan.experts), set(plan.modules)
        logger.info(_WHILE_LOADED, model_name, options.budget_bits, model_name)

    def get_checkpoint_weight_mapper(self) -> Any:  # type: ignore[override]
        """Return the mapper of tensor names that vLLM applies after the model's own.

        transformers takes a ``weight_v`` for that of its weight norm, and vLLM follows it where it runs a model of
        transformers; here the name becomes what it was.
        """
        return compat.extended_mapper("get_checkpoint_weight_mapper", _WEIGHT_NORM)

    def get_cache_scale_mapper(self) -> Any:  # type: ignore[override]
        """Return the mapper of names of KV-cache scales, the only one that older versions of vLLM ask for."""
        extra = {} if compat.has_checkpoint_mapper() else _WEIGHT_NORM
        return compat.extended_mapper("get_cache_scale_mapper", extra)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the tables from checkpoint names to vLLM's; ``re:`` patterns stay, and match a module by either."""
        fmt = self.format
        self._mappers.append(hf_to_vllm_mapper)
        self._stored_experts = {_renamed(name, hf_to_vllm_mapper) for name in self._stored_experts}
        self._stored_modules = {_renamed(name, hf_to_vllm_mapper) for name in self._stored_modules}
        called = partial(names_in_checkpoint, mappers=tuple(self._mappers))

        def rename(name: str) -> str:
            return _renamed(name, hf_to_vllm_mapper)

        self.format = replace(
            fmt,
            ranks=RankTable(
                fmt.ranks.default,
                {rename(name): rank for name, rank in fmt.ranks.modules.items()},
                {rename(name): table for name, table in fmt.ranks.experts.items()},
                called,
            ),
            groups=GroupTable(
                {rename(name): size for name, size in fmt.groups.modules.items()},
                {rename(name): sizes for name, sizes in fmt.groups.experts.items()},
                called,
            ),
            ignore=tuple(rename(name) for name in fmt.ignore),
            called=called,
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer: MiLo's, or vLLM's unquantized one where ``ignore`` names it.

        None leaves a layer to vLLM, whose routed experts are then its own unquantized ones.

        Raises:
            CheckpointError: ignore names only some parts of a fused layer, the checkpoint has several layers that
                this might be, or vLLM would load it wrongly.
        """
        from vllm_milo.fused_moe import MiLoMoEMethod
        from vllm_milo.head.method import MiLoHeadMethod
        from vllm_milo.linear import MiLoLinearMethod
        from vllm_milo.models.gates import watch_gates
        from vllm_milo.models.nameless import NamelessLinearMethod

        watch_gates()
        prefix = name_in_model(prefix, compat.architectures())
        if self.format.lm_head_bits != PLAIN_BITS:
            self._await_head()
            if isinstance(layer, ParallelLMHead) and leaf_of(prefix) in _HEADS:
                self._has_head = True
                return MiLoHeadMethod(self.format.lm_head_bits, prefix)
        if isinstance(layer, RoutedExperts):
            compat.check_after_loading(check_loaded)
            name = experts_in_checkpoint(prefix, self._experts())
            if self.format.ignores(name):
                return None
            what = (self.format, layer.moe_config, name)
            if self._gathering is not None:
                return _online().OnlineMoEMethod(*what, self._gathering)
            method = MiLoMoEMethod(*what)
            if compat.loads_experts_itself(layer):
                if not self._diverted:
                    compat.divert_weights(self._take_expert)
                for one in names_in_checkpoint(name, self._mappers):
                    self._diverted[one] = layer, method
            return method
        if not isinstance(layer, LinearBase):
            return None
        if not prefix or prefix.startswith("."):  # what its parent, which has no name, would be called before
            return NamelessLinearMethod(self)
        parts = self.parts(prefix)
        if leaf_of(prefix) in ROUTERS or self._ignores(prefix, parts):
            return UnquantizedLinearMethod()
        refuse_permuted(parts, compat.architectures())
        named = (self.format, prefix, parts)
        if self._gathering is not None:
            return _online().OnlineLinearMethod(*named, self._gathering)
        return MiLoLinearMethod(*named)

    def _await_head(self) -> None:
        """Say so in one line where tensors of a quantized head come and vLLM's model has asked for no method for it."""
        if self._head_awaited:
            return
        self._head_awaited = True
        is_draft = compat.is_draft()

        def take(name: str, tensor: torch.Tensor) -> bool:
            module, _, leaf = name.rpartition(".")
            if leaf not in HEAD_TENSORS or self._has_head:
                return False
            if is_draft or not compat.holds_head():
                return True  # it gets the head of the model that it drafts for; or another process has it
            raise CheckpointError(
                f"{module}: stored in {self.format.lm_head_bits} bits, and this version of vLLM takes no quantized "
                f"head in {', '.join(compat.architectures())}; convert the model with --lm-head-bits 16"
            )

        compat.divert_weights(take)

    def _take_expert(self, name: str, tensor: torch.Tensor) -> bool:
        """Load a tensor of experts whose model knows no tensors of quantized experts; return whether it was one."""
        module, _, leaf = name.rpartition(".")
        expert = split_expert_name(module)
        if expert is None or expert[0] not in self._diverted:
            return False
        layer, method = self._diverted[expert[0]]
        method.load_expert(layer, *expert[1:], leaf, tensor)
        return True

    def parts(self, prefix: str) -> list[str]:
        """Return the checkpoint names of the matrices that the linear layer ``prefix`` holds."""
        parent, dot, leaf = prefix.rpartition(".")
        names = (FUSED_LAYERS | self.packed_modules_mapping).get(leaf, [leaf])
        parts = [module_in_checkpoint(f"{parent}{dot}{name}", self._stored_modules) for name in names]
        return values_of_keys(parts, self._stored_modules)

    def _experts(self) -> set[str]:
        """Return vLLM's names of the experts' modules that the checkpoint is known to have."""
        fmt = self.format
        kept = (name for name in fmt.ignore if leaf_of(name) == "experts")
        exact = (name for name in (*fmt.ranks.experts, *fmt.groups.experts, *kept) if not name.startswith("re:"))
        return self._stored_experts | set(exact)

    def _ignores(self, prefix: str, parts: list[str]) -> bool:
        ignored = [part for part in parts if self.format.ignores(part)]
        if ignored and len(ignored) < len(parts):
            raise CheckpointError(
                f"quantization_config.ignore names {ignored[0]} but not all parts of {prefix}, which vLLM fuses"
            )
        return bool(ignored)


def _online() -> Any:
    """Return the methods of layers that are quantized while they are loaded; they need the converter."""
    from vllm_milo.online import methods

    return methods


def _renamed(name: str, mapper: Any) -> str:
    renamed = [] if name.startswith("re:") else mapper.apply_list([name])
    return renamed[0] if renamed else name


def _refuse_fused_experts(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse unquantized experts in one tensor where vLLM would not load it and not say so."""
    if compat.loads_fused_experts():
        return
    fused = next((name for name in tensors if is_fused_experts(name)), None)
    if fused is not None:
        raise CheckpointError(
            f"{folder}: {fused}: this version of vLLM does not load fused unquantized experts; upgrade vLLM, or save "
            f"the original with transformers' save_pretrained, which stores each expert by itself, and convert that"
        )


def register_config(config_class: type[MiLoConfig]) -> None:
    """Register a config class under the method's name."""
    register_quantization_config(QUANT_METHOD)(config_class)
