"""``MiLoMoEMethod``: routed experts in 3 bits plus compensators of ragged rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, FusedMoeWeightScaleSupported
from vllm.model_executor.utils import set_weight_attrs

from vllm_milo import compat
from vllm_milo.checkpoint import (
    BASE_TENSORS,
    PACKED,
    SCALE,
    U_SCALE,
    V_SCALE,
    ZERO,
    CheckpointError,
    MiLoFormat,
    TensorSpec,
    U,
    V,
    packed_words,
)
from vllm_milo.kernels import ops
from vllm_milo.kernels.warm_up import wait, warm_up_moe
from vllm_milo.kernels.weights import ExpertWeights, MoESpec, largest_rank
from vllm_milo.loading import account
from vllm_milo.loading.ahead import start_experts
from vllm_milo.models.activations import read_activation
from vllm_milo.models.local_experts import Gemm, LocalExperts
from vllm_milo.models.parameters import ANY_FLOAT, Cut, FactorSlice, FillGuard, factor_dtype, require_split
from vllm_milo.models.refused import refuse_adapters
from vllm_milo.models.routers import plain_router
from vllm_milo.names import EXPERT_PROJECTIONS

_FACTOR_ORDER = (U, U_SCALE, V, V_SCALE)
_SHARD_OF = {"gate": "w1", "up": "w3", "down": "w2"}
"""vLLM's shard ids by role; experts without a gate have their up projection as w1."""
_UNGATED_SHARD_OF = {"up": "w1", "down": "w2"}


class MiLoMoEMethod(FusedMoEMethodBase):
    """Creates, loads and applies the routed experts of one layer.

    Args:
        fmt: the checkpoint contract.
        moe: vLLM's description of the layer.
        prefix: vLLM's name of the layer's experts.

    Raises:
        CheckpointError: experts are to move between processes.
    """

    def __init__(self, fmt: MiLoFormat, moe: FusedMoEConfig, prefix: str) -> None:
        # asked once: torch.compile traces reads of is_monolithic, and cannot trace a search for modules
        self._routes = compat.routes_inside_method()
        self._renormalizes: bool | None = None
        super().__init__(moe)
        if compat.balances_experts():
            raise CheckpointError(
                f"{prefix}: MiLo does not support --enable-eplb: each expert has compensators of ranks of its own, so "
                f"that none fits into the place of another; leave the option out, --enable-expert-parallel needs it not"
            )
        self.format = fmt
        self.prefix = prefix
        self._projections: dict[str, str] = {}

    @property
    def is_monolithic(self) -> bool:
        """Whether the method routes too: where vLLM's router cannot run on the CPU, and where it chooses plainly."""
        return self._routes or self._renormalizes is not None

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """Return the sizes unchanged: the kernels pad their weights themselves."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """Return None: activations are not quantized and the method brings its own kernels."""
        return

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register this process's experts: codes, scales, zero points, and the factors of all one after another.

        Raises:
            CheckpointError: the layer has a feature, a size or a split that is not supported.
        """
        self._renormalizes = plain_router(layer)
        self.activation = read_activation(layer, self.moe, self.prefix)
        if self.moe.is_lora_enabled:
            refuse_adapters(self.prefix, compat.lora_targets())
        self.shard_of = _SHARD_OF if self.moe.is_act_and_mul else _UNGATED_SHARD_OF
        self.hidden, self.intermediate = hidden_size, intermediate_size_per_partition
        self.tp_rank, self.tp_size = layer.moe_config.tp_rank, layer.moe_config.tp_size
        self.local = LocalExperts(layer)
        inputs = tuple(shard for shard in self.shard_of.values() if shard != "w2")
        self.gemms = [
            self._gemm(layer, "w13", len(inputs) * self.intermediate, hidden_size, inputs),
            self._gemm(layer, "w2", hidden_size, self.intermediate, ("w2",)),
        ]
        self.spec = MoESpec(
            self.format.compensator.bits,
            self.activation.name,
            bool(layer.apply_router_weight_on_input),
            [largest_rank(gemm.ranks) for gemm in self.gemms],
            *self.activation[1:4],
        )
        self._check_sizes()
        self.dummy = compat.loads_dummy_weights()
        self.dtype, self.max_tokens = params_dtype, compat.max_tokens()
        self.guard = FillGuard(self.prefix)
        self.guard.expect(self._expected_pieces())
        for gemm in self.gemms:
            self._register(layer, gemm, num_experts, params_dtype, extra_weight_attrs["weight_loader"])
            if self.moe.has_bias:
                # NaN, since vLLM's models may load biases expert by expert
                bias = torch.full((num_experts, gemm.n), torch.nan, dtype=params_dtype)
                layer.register_parameter(f"{gemm.name}_bias", Parameter(bias, requires_grad=False))
                set_weight_attrs(getattr(layer, f"{gemm.name}_bias"), extra_weight_attrs)
        self.kernels = start_experts(
            self.spec,
            self.moe.has_bias,
            (num_experts, self.hidden, self.intermediate),
            [gemm.group_size for gemm in self.gemms],
            layer.global_num_experts,
            self.moe.experts_per_token,
            self.dtype,
            self.max_tokens,
            getattr(layer, f"w13_{PACKED}").device,
            self._renormalizes,
        )
        account.make(self.prefix)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything was loaded, then bring it into the backend's layout.

        Raises:
            CheckpointError: a tensor of this layer never arrived.
        """
        if not self.dummy:
            self.guard.check()
        device = getattr(layer, f"w13_{PACKED}").device
        self.backend = ops.choose_backend("fused_moe", device.type)
        load = account.current()
        with load.spend(account.WARMING_UP):
            wait(self.kernels)
        with load.spend(account.REPACKING):
            self._repack(layer)
        self._finish_kernels(layer)
        account.finish(self.prefix, device)

    def _repack(self, layer: Any) -> None:
        """Replace the layer's parameters by the backend's; beside all layers there is one GEMM more in memory."""
        self.names: dict[str, list[str]] = {}
        for gemm in self.gemms:
            names = [f"{gemm.name}_{tensor}" for tensor in BASE_TENSORS + _FACTOR_ORDER]
            tensors = [getattr(layer, name).data for name in names]
            tensors.append(torch.tensor(gemm.rank_offsets, dtype=torch.int32, device=tensors[0].device))
            weights = ExpertWeights(*tensors)._replace(bias=self._take_bias(layer, gemm))
            prepared = ops.prepare_experts(weights, self.spec, self.backend)
            for name in names:
                delattr(layer, name)
            # the first keeps its name: other parts of vLLM look for it
            self.names[gemm.name] = [names[0], *(f"{gemm.name}_milo_{i}" for i in range(1, len(prepared)))]
            for name, tensor in zip(self.names[gemm.name], prepared, strict=True):
                layer.register_parameter(name, Parameter(tensor, requires_grad=False))

    def _finish_kernels(self, layer: Any) -> None:
        """Look for tiles, and begin to compile what :func:`start_experts` did not foresee."""
        weights, top_k = self._weights(layer), self.moe.experts_per_token
        ops.find_tiles(*weights, self.spec, top_k, self.dtype, self.backend)
        sizes = self.hidden, layer.global_num_experts, top_k
        expert_map, most = layer.expert_map, self.max_tokens
        warm_up_moe(*weights, expert_map, self.spec, self.backend, *sizes, self.dtype, most, self._renormalizes)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this rank's partial sum [T, H]; vLLM runs the shared experts and reduces over ranks."""
        w13, w2 = self._weights(layer)
        return ops.fused_moe(x, topk_weights, topk_ids, layer.expert_map, w13, w2, self.spec, self.backend)

    def _take_bias(self, layer: Any, gemm: Gemm) -> torch.Tensor | None:
        """Take a GEMM's biases from the layer, fp32 [experts, n] in the order of the rows; None where it has none.

        Raises:
            CheckpointError: some were not loaded, or are no numbers.
        """
        if not self.moe.has_bias:
            return None
        name = f"{gemm.name}_bias"
        bias = getattr(layer, name).data.float()
        delattr(layer, name)
        if not bias.isfinite().all():
            raise CheckpointError(f"{self.prefix}: {name} was not loaded for all experts, or holds NaN or Inf")
        if self.activation.interleaved and gemm.parts == 2:
            bias = bias.unflatten(1, (-1, 2)).mT.flatten(1).contiguous()
        return bias

    def load_expert(self, layer: Any, expert: int, projection: str, tensor: str, values: torch.Tensor) -> None:
        """Load a tensor of an expert's matrix, where the model's own loader knows no such tensors.

        Args:
            layer: vLLM's.
            expert: its number in the model.
            projection: last part of the matrix's name in the checkpoint.
            tensor: last part of the tensor's name.
            values: the tensor.

        Raises:
            CheckpointError: a checkpoint has no such tensor, or of another shape or dtype.
        """
        shard = self.shard_of.get(EXPERT_PROJECTIONS.get(projection, ""))
        if shard is None or tensor not in BASE_TENSORS + _FACTOR_ORDER:
            raise CheckpointError(f"{self.prefix}.{expert}.{projection}.{tensor} is extra: experts have no such tensor")
        name = f"{self._place(shard)[0].name}_{tensor}"
        parameter: Any = getattr(layer, name)
        parameter.weight_loader(parameter, values, f"{self.prefix}.{name}", shard, expert)

    def _weights(self, layer: torch.nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return both GEMMs' tensors as the backend takes them."""
        # in each call; by attributes of a module the host would take ten times as long
        known: dict[str, Any] = layer._parameters
        w13, w2 = ([known[name] for name in self.names[gemm]] for gemm in ("w13", "w2"))
        return w13, w2

    def apply_monolithic(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Route, then :meth:`apply`; see :attr:`is_monolithic`."""
        if self._renormalizes is not None:
            routing = compat.padding_rows(x.shape[0]), self.moe.experts_per_token, self._renormalizes, layer.expert_map
            return ops.routed_moe(x, router_logits, *routing, *self._weights(layer), self.spec, self.backend)
        topk_weights, topk_ids = compat.select_experts(layer, x, router_logits)
        return self.apply(layer, x, topk_weights, topk_ids)

    def _gemm(self, layer: Any, name: str, n: int, k: int, shards: tuple[str, ...]) -> Gemm:
        """Return one of the layer's GEMMs, of the shards that it computes together."""
        group_size = self.format.groups.of_experts(self.prefix, self._projection(shards[0]), self.format.group_size)
        return Gemm(name, n, k, group_size, self._local_ranks(layer, shards), shards)

    def _local_ranks(self, layer: Any, shards: tuple[str, ...]) -> list[list[int]]:
        """Return the ranks of this process's experts, by local expert and part."""
        table = self.format.ranks
        by_shard = []
        for shard in shards:
            projection = self._projection(shard)
            ranks = table.of_experts(self.prefix, projection, layer.global_num_experts)
            by_shard.append([ranks[expert] for expert in self.local.global_ids])
        return [list(expert) for expert in zip(*by_shard, strict=True)]

    def _projection(self, shard: str) -> str:
        """Return the checkpoint's name of a shard, by the rank table; w1 and gate_proj mean the same."""
        if (known := self._projections.get(shard)) is None:
            known = self._projections[shard] = self._find_projection(shard)
        return known

    def _find_projection(self, shard: str) -> str:
        roles = {EXPERT_PROJECTIONS[name]: name for name in self.format.ranks.projections_of(self.prefix)}
        role = next(role for role, known in self.shard_of.items() if known == shard)
        return roles.get(role, shard if self.moe.is_act_and_mul else f"{role}_proj")

    def _check_sizes(self) -> None:
        cuts = []
        full = self.intermediate * self.tp_size
        for gemm in self.gemms:
            name = f"{self.prefix} {gemm.name}"
            n, k = (full, gemm.k) if gemm.name == "w13" else (gemm.n, full)
            self.format.check_matrix(name, n, k, gemm.group_size)
            of_n, of_k = self.format.compensator.split_multiples(gemm.group_size, any(map(any, gemm.ranks)))
            cuts.append(
                Cut(name, "output size", full, of_n) if gemm.name == "w13" else Cut(name, "input size", full, of_k)
            )
        require_split(cuts, self.tp_size, ", and with --enable-expert-parallel, which cuts no expert")

    def _expected_pieces(self) -> Iterator[tuple[str, TensorSpec]]:
        full = self.intermediate * self.tp_size
        for shard in self.shard_of.values():
            n, k = (self.hidden, full) if shard == "w2" else (full, self.hidden)
            gemm, part = self._place(shard)
            for local, expert in enumerate(self.local.global_ids):
                specs = self.format.base_tensors(n, k, gemm.group_size)
                specs |= self.format.factor_tensors(n, k, gemm.ranks[local][part], ANY_FLOAT)
                for tensor, spec in specs.items():
                    yield self._piece(expert, shard, tensor), spec

    def _piece(self, expert: int, shard: str, tensor: str) -> str:
        return f"{self.prefix}.{expert}.{self._projection(shard)}.{tensor}"

    def _place(self, shard: str) -> tuple[Gemm, int]:
        gemm = next(gemm for gemm in self.gemms if shard in gemm.shards)
        return gemm, gemm.shards.index(shard)

    def _register(
        self, layer: torch.nn.Module, gemm: Gemm, experts: int, params_dtype: torch.dtype, loader: Callable[..., Any]
    ) -> None:
        compensator = self.format.compensator
        columns = gemm.n // gemm.parts
        total = gemm.rank_offsets[-1]
        groups = (experts, gemm.n, gemm.k // gemm.group_size)
        shapes: dict[str, tuple[int, ...]] = {
            PACKED: (experts, gemm.n, packed_words(gemm.k)),
            SCALE: groups,
            ZERO: groups,
            U: (total, compensator.row(columns, "")[1]),
            U_SCALE: (total, columns // compensator.group_size) if compensator.quantized else (0, 0),
            V: (total, compensator.row(gemm.k, "")[1]),
            V_SCALE: (total, gemm.k // compensator.group_size) if compensator.quantized else (0, 0),
        }
        dtypes = {PACKED: torch.int32, SCALE: torch.float16, ZERO: torch.float16}
        for tensor, shape in shapes.items():
            is_base = tensor in BASE_TENSORS
            dtype = dtypes[tensor] if is_base else factor_dtype(tensor, compensator, params_dtype)
            parameter = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            attributes = {
                "weight_loader": self._loader(tensor, loader if is_base else None),
                "quant_method": FusedMoeWeightScaleSupported.GROUP.value,
            }
            set_weight_attrs(parameter, attributes)
            layer.register_parameter(f"{gemm.name}_{tensor}", parameter)

    def _loader(self, tensor: str, base: Callable[..., Any] | None) -> Callable[..., bool | None]:
        """Return a weight loader that checks a tensor, then hands it to vLLM's or cuts the factor itself."""

        def take(
            param: Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int, local: int
        ) -> None:
            if not param.is_meta:  # as where vLLM counts first what a loader copies
                self.guard.fill(self._piece(expert_id, shard_id, tensor), loaded_weight)
            if base is None:
                self._load_factor(param, loaded_weight, tensor, shard_id, local)
            else:
                base(param, loaded_weight, weight_name, shard_id, expert_id)
            account.current().arrive()

        return self._local_loader(take)

    def _local_loader(self, take: Callable[..., None]) -> Callable[..., bool | None]:
        """Return a weight loader as vLLM calls it, which passes over the experts of other processes.

        Args:
            take: gets the parameter, the tensor, its name, the shard, and the expert's number in the model and here.
        """

        def load(
            param: Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = self.local.index(expert_id)
            if local is None:
                return False if return_success else None
            take(param, loaded_weight, weight_name, shard_id, expert_id, local)
            return True if return_success else None

        return load

    def _load_factor(self, param: Parameter, loaded: torch.Tensor, tensor: str, shard: str, local: int) -> None:
        gemm, part = self._place(shard)
        slot = local * gemm.parts + part
        first, stop = gemm.rank_offsets[slot], gemm.rank_offsets[slot + 1]
        # U of w1 and w3 runs along the intermediate size, which is cut; so does V of w2
        is_cut = (shard == "w2") == (tensor in (V, V_SCALE))
        columns = gemm.n // gemm.parts if tensor in (U, U_SCALE) else gemm.k
        cut = FactorSlice(self.tp_rank * columns if is_cut else 0, columns)
        is_scale = tensor in (U_SCALE, V_SCALE)
        param.data[first:stop].copy_(cut.elements(self.format.compensator, loaded, is_scale))
