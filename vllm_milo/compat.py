"""What vLLM's versions differ in, found by capability, never by number; and what is read from its configuration."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from vllm import config as vllm_config
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from vllm_milo.values import CheckpointError, one_line

_LAYERS = "vllm.model_executor.layers.fused_moe"
_CHECK = "track_weights_loading"
"""Of a loader: how it checks that a model is complete."""
_WHOLE_EXPERTS = ("Step3TextForCausalLM", "Step3VLForConditionalGeneration", "AriaForConditionalGeneration")
"""Architectures whose models load all experts of a layer from one tensor, and those of one wrongly or not at all."""
_WEIGHT_ONLY = (
    "vllm.model_executor.kernels.linear",
    "vllm.model_executor.layers.quantization.kernels.mixed_precision",
)
"""Where versions of vLLM keep their weight-only linear kernels, the newest first."""


def routes_inside_method() -> bool:
    """Return whether a MoE method must do the routing itself.

    On the CPU, vLLM up to 0.31 has only routers that call CUDA operators; there a method is "monolithic":
    it gets router logits. Later versions have a CPU router.
    """
    return current_platform.is_cpu() and importlib.util.find_spec(f"{_LAYERS}.router.cpu_router") is None


def loads_fused_experts() -> bool:
    """Return whether vLLM loads unquantized experts from one 3-D tensor; older versions may pass over it silently."""
    mapping = getattr(RoutedExperts, "get_expert_mapping", None)
    return mapping is not None and "include_fused" in inspect.signature(mapping).parameters


def select_experts(layer: Any, x: torch.Tensor, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Route on the CPU where :func:`routes_inside_method`; return top-k weights and expert ids."""
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

    return select_experts(
        hidden_states=x,
        router_logits=router_logits,
        top_k=layer.top_k,
        use_grouped_topk=layer.use_grouped_topk,
        renormalize=layer.renormalize,
        topk_group=layer.topk_group,
        num_expert_group=layer.num_expert_group,
        custom_routing_function=layer.custom_routing_function,
        scoring_func=layer.scoring_func,
        routed_scaling_factor=layer.routed_scaling_factor,
        e_score_correction_bias=layer.e_score_correction_bias,
    )


def runs_on_nvidia() -> bool:
    """Return whether the device is a GPU of NVIDIA."""
    return bool(current_platform.is_cuda())


def returns_choices() -> bool:
    """Return whether users are told which experts were chosen (``--enable-return-routed-experts``)."""
    config = get_current_vllm_config()
    parts = config.model_config, getattr(config, "aux_output_config", None)
    return any(getattr(part, "enable_return_routed_experts", False) for part in parts)


def padding_rows(tokens: int) -> torch.Tensor | None:
    """Return which rows of a step are no token's, bool [tokens], as vLLM's routers ask; None where it does not say."""
    from vllm import envs
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not getattr(envs, "VLLM_MOE_SKIP_PADDING", False) or not is_forward_context_available():
        return None
    rows = getattr(get_forward_context(), "is_padding", None)
    return None if rows is None else rows[:tokens]


def loads_dummy_weights() -> bool:
    """Return whether the model under construction gets random weights (``--load-format dummy``)."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def max_tokens() -> int:
    """Return the most tokens that the model under construction gets in a step."""
    return int(get_current_vllm_config().scheduler_config.max_num_batched_tokens)


def graph_notes() -> dict[str, Any] | None:
    """Return a part of the configuration of the model under construction that tells its compiled graphs apart.

    What a plugin puts there must be JSON. None where another plugin keeps something of its own in its place.
    """
    notes = get_current_vllm_config().additional_config
    return notes if isinstance(notes, dict) else None


def place_on_host() -> tuple[int, int]:
    """Return which of this host's processes of the model under construction this is, from 0, and how many there are."""
    parallel = get_current_vllm_config().parallel_config
    local = max(1, int(getattr(parallel, "local_world_size", parallel.world_size)))
    replicas = max(1, int(getattr(parallel, "data_parallel_size_local", 1)))
    replica = int(getattr(parallel, "data_parallel_rank_local", None) or 0) % replicas
    return replica * local + int(parallel.rank) % local, replicas * local


def balances_experts() -> bool:
    """Return whether experts may move between processes while the model is served (``--enable-eplb``)."""
    return bool(getattr(get_current_vllm_config().parallel_config, "enable_eplb", False))


def architectures() -> tuple[str, ...]:
    """Return the architectures of the model under construction, by its config.json."""
    model = get_current_vllm_config().model_config
    return () if model is None else tuple(getattr(model.hf_config, "architectures", None) or ())


def lora_targets() -> tuple[str, ...] | None:
    """Return the modules that adapters may change (``--lora-target-modules``); None for any."""
    found = getattr(get_current_vllm_config().lora_config, "target_modules", None)
    return None if found is None else tuple(found)


def is_draft() -> bool:
    """Return whether the model under construction drafts for another."""
    _, model_config = _loader_on_stack()
    return getattr(model_config, "runner_type", None) == "draft"


def holds_head() -> bool:
    """Return whether this process has the end of the model: with pipeline parallelism the last one alone has it."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def weight_only_kernel(
    layer: str, bits: int, shapes: tuple[tuple[int, int], tuple[int, int]], group_size: int, dtype: torch.dtype
) -> Callable[[str, str, str], Any] | None:
    """Return what makes vLLM's kernel for x·Wᵀ of symmetric integers, from the names of words, scales and zero points.

    Args:
        layer: its name, for messages.
        bits: 8 or 4.
        shapes: [inputs, outputs] of the whole layer, and of this process's part.
        group_size: weights along the inputs that share a scale; -1 for all.
        dtype: of activations and scales.

    Returns:
        None on CPUs: vLLM's kernel there takes 4 bits alone, says so in builds without it too, and may round
        activations to 8 bits.

    Raises:
        CheckpointError: this version of vLLM has no such kernels, or none on this GPU takes the layer.
    """
    if current_platform.is_cpu():
        return None
    from vllm.scalar_type import scalar_types

    place = next((name for name in _WEIGHT_ONLY if _has(name)), None)
    if place is None:
        raise CheckpointError(
            f"{layer}: lm_head_bits is {bits}, and this version of vLLM has no weight-only linear kernels; upgrade "
            f"vLLM, or convert the model with --lm-head-bits 16"
        )
    kernels = importlib.import_module(place)
    weight_type = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    settings = {"weight_type": weight_type, "act_type": dtype, "group_size": group_size, "zero_points": False}
    known = {field.name for field in dataclasses.fields(kernels.MPLinearLayerConfig)}
    if "has_g_idx" in known:  # of versions that also take activations in another order
        settings["has_g_idx"] = False
    config = kernels.MPLinearLayerConfig(*shapes, **settings)
    try:
        return partial(kernels.choose_mp_linear_kernel(config), config)
    except ValueError as error:
        raise CheckpointError(
            f"{layer}: lm_head_bits is {bits}, and no kernel of vLLM takes it here ({one_line(error)}); convert the "
            f"model with --lm-head-bits 16"
        ) from error


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def has_checkpoint_mapper() -> bool:
    """Return whether vLLM asks a quantization how to rename a checkpoint's tensors."""
    return hasattr(QuantizationConfig, "get_checkpoint_weight_mapper")


def extended_mapper(getter: str, suffixes: Mapping[str, str]) -> Any:
    """Return the mapper that quantizations inherit, with further ends of names.

    Args:
        getter: of ``QuantizationConfig``; some versions have none, or an instance method that returns None.
        suffixes: new ends by old ones.
    """
    from vllm.model_executor.models.utils import WeightsMapper  # which imports all that models need

    inherited = inspect.getattr_static(QuantizationConfig, getter, None)
    own = WeightsMapper(orig_to_new_suffix=dict(suffixes))
    return inherited.__func__() | own if isinstance(inherited, staticmethod) else own


def check_after_loading(check: Callable[..., None]) -> None:
    """Let vLLM's loader of the model under construction call ``check`` in place of its own check of completeness.

    vLLM decides whether to check when it makes a loader, before any quantization is asked, and hands the loader to
    nobody; the one that builds this model is on the stack. Loaders that have no such check are left alone, also where
    the user decided about it, and those of draft models, which share parameters with the model they draft for.

    Args:
        check: takes the model and the names of what was loaded, or None.
    """
    loader, model_config = _loader_on_stack()
    is_draft = getattr(model_config, "runner_type", None) == "draft"
    if getattr(loader, "enable_weights_track", False) is None and not is_draft:
        loader.enable_weights_track = True
        setattr(loader, _CHECK, check)


def quantization() -> Any:
    """Return the ``QuantizationConfig`` of the model under construction; None where there is none of either."""
    current = getattr(vllm_config, "get_current_vllm_config_or_none", get_current_vllm_config)()
    return getattr(current, "quant_config", None)


def is_batch_invariant() -> bool:
    """Return whether users ask that results do not depend on what else is in a batch (``VLLM_BATCH_INVARIANT=1``)."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))


def watch_gates(watch: Callable[[Any], None]) -> None:
    """Let vLLM show ``watch`` each router's gate that it makes in this process from now on.

    vLLM lets plugins put a layer of their own in the place of one of its. It shows nothing where another plugin has
    done that for gates, or in a version whose gates are none of such layers.
    """
    try:
        from vllm.model_executor.custom_op import op_registry_oot
        from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
    except ImportError:
        return
    if GateLinear.__name__ in op_registry_oot or not hasattr(GateLinear, "register_oot"):
        return

    class WatchedGate(GateLinear):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            watch(self)

    GateLinear.register_oot(WatchedGate)


def loads_experts_itself(layer: Any) -> bool:
    """Return whether a model has a loader of its own for routed experts, which knows no quantized ones.

    That shows in the layer, whose loader is then another than vLLM's, or is known of the model's architecture.
    """
    if type(layer).weight_loader is not RoutedExperts.weight_loader:
        return True
    return any(name in _WHOLE_EXPERTS for name in architectures())


def divert_weights(take: Callable[[str, torch.Tensor], bool]) -> None:
    """Let the loader of the model under construction offer each tensor of the checkpoint before the model sees it.

    Args:
        take: gets its name in the checkpoint and the tensor, and returns whether the model should not get it.
    """
    loader, _ = _loader_on_stack()
    if loader is None:
        return  # of another kind: the layers will say what they lack
    everything = loader.get_all_weights

    def rest(*arguments: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in everything(*arguments, **options) if not take(name, tensor))

    loader.get_all_weights = rest


def _loader_on_stack() -> tuple[Any, Any]:
    """Return vLLM's default loader of the model under construction, and its model's configuration, or None twice."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    frame = inspect.currentframe()
    while frame is not None:
        loader = frame.f_locals.get("self")
        if isinstance(loader, DefaultModelLoader):
            return loader, frame.f_locals.get("model_config")
        frame = frame.f_back
    return None, None
