"""Experts with biases, with clamped or scaled activations, and without a gate: reference and Triton against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from random_layers import moe_spec, random_experts, random_routing, relative_error

from vllm_milo.kernels import ops
from vllm_milo.kernels.reference import expert_gemm
from vllm_milo.kernels.serving import fused_moe as triton_moe
from vllm_milo.kernels.serving.gemm.config import GemmConfig
from vllm_milo.kernels.weights import ExpertWeights, MoESpec

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # bf16 dots are wrong interpreted
EXPERTS, HIDDEN, INTERMEDIATE = 4, 128, 64


class Kind(NamedTuple):
    """What a layer's experts have."""

    activation: str = "silu"
    limit: float = 0.0
    alpha: float = 1.0
    beta: float = 0.0
    bias: bool = False
    local: tuple[int, ...] = (0, 1, 2, 3)
    on_input: bool = False
    intermediate: int = INTERMEDIATE


# inputs are large enough for the limits to matter
KINDS = [
    Kind(bias=True),
    Kind(limit=0.5),
    Kind("silu", 0.7, 1.702, 1.0, bias=True),
    Kind("silu", 0.7, 1.702, 1.0, bias=True, local=(2, 0)),
    Kind("silu", 0.0, 1.702, 0.0),
    Kind("gelu_tanh", 0.5, bias=True),
    Kind("swiglustep", 0.4),
    Kind("swiglustep", 0.4, bias=True, local=(3, 1)),
    Kind("relu2_no_mul"),
    Kind("relu2_no_mul", bias=True, local=(3, 1)),
    Kind("relu2_no_mul", intermediate=96),
    Kind("silu", 0.7, 1.702, 1.0, bias=True, intermediate=96),
    Kind("silu", 0.7, 1.702, 1.0, bias=True, on_input=True),
]


class Layer:
    """A random layer of a kind, and its exact result."""

    def __init__(self, kind: Kind) -> None:
        torch.manual_seed(1)
        parts = 1 if kind.activation.endswith("_no_mul") else 2
        held = range(len(kind.local))
        r13 = [[8 * ((expert + part) % 3) for part in range(parts)] for expert in held]
        r2 = [[8 * (expert % 2)] for expert in held]
        bits, group = (3, 64) if kind.intermediate % 64 == 0 else (16, 32)
        self.kind = kind
        self.w13 = random_experts(r13, parts * kind.intermediate, HIDDEN, group, bits)
        self.w2 = random_experts(r2, HIDDEN, kind.intermediate, group, bits)
        if kind.bias:
            self.w13, self.w2 = (w._replace(bias=torch.randn(w.packed.shape[:2])) for w in (self.w13, self.w2))
        plain = moe_spec(r13, r2, bits, kind.activation, kind.on_input)
        self.spec = plain._replace(limit=kind.limit, alpha=kind.alpha, beta=kind.beta)
        self.expert_map = None
        if len(kind.local) < EXPERTS:
            self.expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
            self.expert_map[list(kind.local)] = torch.arange(len(kind.local), dtype=torch.int32)
        self.weights, self.ids = random_routing(9, 2, EXPERTS)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """The layer in float64, by the words of MoESpec, a pair at a time."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token, (weights, ids) in enumerate(zip(self.weights.double(), self.ids.tolist(), strict=True)):
            for weight, expert in zip(weights, ids, strict=True):
                if expert not in self.kind.local:
                    continue
                local = self.kind.local.index(expert)
                row = x[token : token + 1].double() * (weight if self.kind.on_input else 1)
                hidden = _hidden(self._gemm(row, self.w13, local), self.kind)
                result = self._gemm(hidden, self.w2, local)[0]
                out[token] += result * (1 if self.kind.on_input else weight)
        return out

    def _gemm(self, row: torch.Tensor, weights: ExpertWeights, expert: int) -> torch.Tensor:
        y = expert_gemm(row, weights._replace(bias=None), expert, self.spec)
        return y if weights.bias is None else y + weights.bias[expert].double()

    def run(self, x: torch.Tensor, backend: str, device: str = "cpu", tile: GemmConfig | None = None) -> torch.Tensor:
        """The layer by a backend."""
        gemms = [type(w)(*(tensor.to(device) for tensor in w.present)) for w in (self.w13, self.w2)]
        prepared = [ops.prepare_experts(w, self.spec, backend) for w in gemms]
        expert_map = None if self.expert_map is None else self.expert_map.to(device)
        arguments = (x.to(device), self.weights.to(device), self.ids.to(device), expert_map, *prepared, self.spec)
        return ops.fused_moe(*arguments, backend) if tile is None else triton_moe.fused_moe(*arguments, (tile, tile))


def _hidden(y: torch.Tensor, kind: Kind) -> torch.Tensor:
    if kind.activation == "relu2_no_mul":
        return y.relu() ** 2
    gate, up = y.chunk(2, dim=-1)
    if kind.activation == "swiglustep":
        return (gate * gate.sigmoid()).minimum(torch.tensor(kind.limit)) * up.clip(-kind.limit, kind.limit)
    if kind.limit:
        gate, up = gate.minimum(torch.tensor(kind.limit)), up.clip(-kind.limit, kind.limit)
    if kind.activation == "silu":
        return gate * (kind.alpha * gate).sigmoid() * (up + kind.beta)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reference(kind):
    layer, x = Layer(kind), torch.randn(9, HIDDEN)
    assert relative_error(layer.run(x, "torch"), layer.exact(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_triton(kind, dtype, kernel_device):
    layer, x = Layer(kind), torch.randn(9, HIDDEN).to(dtype)
    assert relative_error(layer.run(x, "triton", kernel_device), layer.exact(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split_k", [1, 2])
def test_tiles(split_k, dtype, kernel_device):
    """The partial sums of a split K get one bias."""
    tile = GemmConfig(16, 64, split_k, False, 4, 2)
    for kind in (KINDS[2], Kind("relu2_no_mul", bias=True)):
        layer, x = Layer(kind), torch.randn(9, HIDDEN).to(dtype)
        assert relative_error(layer.run(x, "triton", kernel_device, tile), layer.exact(x)) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_many_tokens_of_bf16_leave_the_fast_path(kernel_device):
    layer, x = Layer(KINDS[2]), torch.randn(9, HIDDEN).to(torch.bfloat16)
    tile = GemmConfig(128, 128, 1, True, 8, 3)
    assert relative_error(layer.run(x, "triton", kernel_device, tile), layer.exact(x)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.limit or kind.bias], ids=str)
def test_what_the_kinds_add_matters_here(kind):
    """Inputs are such that a clamp or bias that is left out would be seen."""
    layer, x = Layer(kind), torch.randn(9, HIDDEN)
    bare = [weights._replace(bias=None) for weights in (layer.w13, layer.w2)]
    plain: MoESpec = layer.spec._replace(limit=0.0, activation=kind.activation.replace("swiglustep", "silu"))
    prepared = [ops.prepare_experts(weights, plain, "torch") for weights in bare]
    found = ops.fused_moe(x, layer.weights, layer.ids, layer.expert_map, *prepared, plain, "torch")
    assert relative_error(found, layer.exact(x)) > 0.01
