"""V·x and who adds its parts of K, against float64, in the interpreter (fp16) and on the GPU (fp16 and bf16)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from random_layers import moe_spec, random_experts, random_linear, random_routing, relative_error

from vllm_milo.kernels import ops
from vllm_milo.kernels.launch import launch_mode
from vllm_milo.kernels.reference import expert_factors
from vllm_milo.kernels.serving import fused_moe, prepare
from vllm_milo.kernels.serving.dense import linear
from vllm_milo.kernels.serving.gemm.config import WARPGROUP_TOKENS, GemmConfig
from vllm_milo.kernels.serving.layout import KernelWeights, prepare_experts
from vllm_milo.kernels.serving.projection import launcher
from vllm_milo.kernels.serving.projection import plan as planning
from vllm_milo.kernels.serving.projection.plan import DownShape, Plan, plan
from vllm_milo.kernels.serving.routing import Routes, TokenBlocks
from vllm_milo.kernels.weights import LinearWeights

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@dataclass
class Case:
    """``ranks[expert][part]``; a dense layer without ``top_k``. Ids that are not ``local`` go nowhere."""

    ranks: list[list[int]]
    tokens: int
    top_k: int = 0
    k: int = 320
    block_m: int = 32
    splits: int = 2
    bits: int = 3
    local: list[int] | None = field(default=None)

    @property
    def in_lanes(self) -> bool:
        """Whether x is read in the order of lanes, as layers do with so few pairs a block."""
        return self.block_m < WARPGROUP_TOKENS


RAGGED = [[8, 24], [0, 0], [40, 16], [0, 8]]
CASES = {
    "dense": Case([[24]], 5),
    "dense, three parts and rank tiles": Case([[72, 40, 8]], 33, k=640, splits=3),
    "dense, a block of 128": Case([[16]], 150, block_m=128),
    "one token": Case([[16, 16]] * 3, 1, 2, block_m=16, splits=3),
    "one dense row": Case([[136]], 1, block_m=16, k=1024, splits=5),
    "ragged": Case(RAGGED, 40, 2),
    "ragged, several rank tiles": Case([[96, 8], [0, 0], [64, 64], [8, 0]], 11, 2, k=576, splits=5),
    "empty experts": Case([[16, 16]] * 20, 3, 2, block_m=16),
    "expert map": Case(RAGGED[:2], 23, 3, local=[4, 1]),
    "no expert here": Case(RAGGED[:1], 9, 2, local=[6]),
    "8 bits": Case(RAGGED, 7, 1, bits=8),
    "16 bits": Case(RAGGED, 7, 1, bits=16, splits=3),
    "blocks of 8": Case(RAGGED, 11, 2, k=576, block_m=8, splits=3),
    "blocks of 8, expert map": Case(RAGGED[:2], 9, 3, local=[4, 1], block_m=8),
    "blocks of 8, one token": Case([[16, 16]] * 3, 1, 2, block_m=8, splits=3),
    "blocks of 8, dense": Case([[72, 40, 8]], 6, k=640, block_m=8, splits=3),
    "blocks of 8, 8 bits": Case(RAGGED, 7, 1, bits=8, block_m=8),
    "more parts than units": Case([[16]], 5, k=192, splits=4),
}


class Projection:
    """The random V of a case and its input, on a device."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        self.case, self.device = case, device
        self.weights = random_experts(case.ranks, 64 * len(case.ranks[0]), case.k, 64, case.bits)
        moved = type(self.weights)(*(t if t is None else t.to(device) for t in self.weights))
        self.prepared: KernelWeights = prepare_experts(moved, case.bits)
        self.x = torch.randn(case.tokens, case.k).to(dtype)
        self.ids, self.map = None, None
        if case.top_k:
            total = max(case.local) + 2 if case.local else len(case.ranks)
            self.ids = random_routing(case.tokens, case.top_k, total)[1]
            self.map = torch.arange(total, dtype=torch.int32)
            if case.local:
                self.map.fill_(-1)
                self.map[case.local] = torch.arange(len(case.local), dtype=torch.int32)
                if len(case.local) == 1:
                    self.ids.clamp_(max=1)

    @property
    def padded(self) -> list[list[int]]:
        """Ranks as the kernels hold them."""
        return [[-(-rank // 16) * 16 for rank in expert] for expert in self.case.ranks]

    def run(self) -> tuple[torch.Tensor, torch.Tensor, TokenBlocks, Plan]:
        """Return V·x, the counters after it, the blocks and how it was spread."""
        case = self.case
        x = self.x.to(self.device)
        routes = None
        if self.ids is not None:
            routes = Routes(self.ids.to(self.device), self.map.to(self.device) if case.local else None)
        mode = launch_mode(x.device, few_tokens=True)
        shape = DownShape(max(sum(expert) for expert in self.padded), self.prepared.units, 1)
        # as if there were two in a layer, of which this is the second
        source, blocks, (_, planned) = prepare.prepare(
            x, routes, len(case.ranks), case.block_m, 64, False, True, case.in_lanes, [shape, shape], mode
        )
        top_k = case.top_k or 1
        down = launcher.project(source, self.prepared, blocks, routes, top_k, case.bits, planned, mode)
        return down, planned.counters, blocks, planned.plan

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float64 [pairs, ranks], and which of them mean anything."""
        case = self.case
        pairs = case.tokens * max(1, case.top_k)
        out = torch.zeros(pairs, max(sum(expert) for expert in self.padded), dtype=torch.float64)
        known = torch.zeros_like(out, dtype=torch.bool)
        for pair in range(pairs):
            expert = 0 if self.ids is None else int(self.map[int(self.ids.flatten()[pair])])
            if expert < 0:
                continue
            row, slot = self.x[pair // max(1, case.top_k)].double(), 0
            factors = expert_factors(self.weights, expert, case.bits, torch.float64)
            for (_, v), room in zip(factors, self.padded[expert], strict=True):
                out[pair, slot : slot + v.shape[0]] = v @ row
                known[pair, slot : slot + room] = True
                slot += room
        return out, known


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, int], None]:
    """Choose whether programs of V·x add its parts, and how many those are."""

    def choose(finish: bool, splits: int) -> None:
        monkeypatch.setattr(planning, "_finishes", lambda *_: finish)
        monkeypatch.setattr(planning, "_splits", lambda *_: splits)

    return choose


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("finish", [True, False], ids=["finish", "parts"])
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str, finish: bool, dtype: torch.dtype, kernel_device: str, forced):
    """With counters and parts that are garbage before the launches."""
    case = CASES[name]
    forced(finish, case.splits)
    torch.manual_seed(1)
    layer = Projection(case, dtype, kernel_device)
    down, _, _, how = layer.run()
    assert how.finish == finish
    assert (down.dtype, down.shape[0]) == ((dtype, 1) if finish else (torch.float32, how.splits))
    expected, known = layer.exact()
    found = down.double().sum(0).cpu()
    assert bool(known.any()) == (name != "no expert here")
    assert relative_error(found[known], expected[known]) < TOLERANCE[dtype]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", CASES)
def test_counters_end_at_the_parts_where_blocks_are_in_use(name: str, kernel_device: str, forced):
    case = CASES[name]
    forced(True, case.splits)
    torch.manual_seed(1)
    _, counters, blocks, how = Projection(case, torch.float16, kernel_device).run()
    assert counters.dtype == torch.int32
    assert counters.numel() >= how.counters == how.blocks * how.rank_tiles
    used = torch.ones(how.blocks, how.rank_tiles, dtype=torch.int32)
    if blocks.num_blocks is not None:
        used[int(blocks.num_blocks) * how.sub_blocks :] = 0
    assert torch.equal(counters[: how.counters].cpu().view_as(used), used * how.splits)
    assert not counters[how.counters :].any()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", ["dense, three parts and rank tiles", "ragged, several rank tiles"])
def test_whichever_program_is_last_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch, forced):
    """The interpreter runs programs in their order; here in any other."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is chosen per process; this one has a GPU")
    case = CASES[name]
    forced(True, case.splits)
    layer = Projection(case, torch.float16, "cpu")
    first, *_, how = layer.run()
    programs = how.blocks * how.splits * how.rank_tiles
    builder = interpreter.interpreter_builder
    in_order, launch = builder.set_grid_idx, launcher.launch
    for _ in range(4):
        order = torch.randperm(programs).tolist()

        def other(x: int, y: int, z: int, order=order) -> None:
            place = order[x + how.splits * (y + how.rank_tiles * z)]
            in_order(place % how.splits, place // how.splits % how.rank_tiles, place // (how.splits * how.rank_tiles))

        def shuffled(*arguments, other=other, **constants):
            with monkeypatch.context() as patch:
                patch.setattr(builder, "set_grid_idx", other)
                launch(*arguments, **constants)

        monkeypatch.setattr(launcher, "launch", shuffled)
        again, *_ = layer.run()
        known = layer.exact()[1]
        assert torch.equal(again[0][known], first[0][known])


def record_finishes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that grows with each launch of V·x by whether its programs add its parts."""
    seen, launch = [], launcher.launch

    def noted(*arguments, **constants):
        seen.append(constants["TILE"].FINISH)
        launch(*arguments, **constants)

    monkeypatch.setattr(launcher, "launch", noted)
    return seen


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_layers_give_the_same_bits_whoever_adds(
    tokens: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch, forced
):
    """The GEMM adds the parts in the same order and rounds them alike."""
    seen = record_finishes(monkeypatch)
    weights, spec = random_linear([192, 64], [72, 24], 384, 64, 3)
    dense = ops.prepare_linear(LinearWeights(*(t.to(kernel_device) for t in weights)), spec, "triton")
    ranks13, ranks2 = [[16, 8], [0, 0], [24, 16]], [[8], [16], [0]]
    experts_spec = moe_spec(ranks13, ranks2, 3)
    w13, w2 = (
        prepare_experts(type(w)(*(t.to(kernel_device) for t in w.present)), 3)
        for w in (random_experts(ranks13, 384, 384, 64, 3), random_experts(ranks2, 384, 192, 64, 3))
    )
    x = torch.randn(tokens, 384).half().to(kernel_device)
    router, ids = (t.to(kernel_device) for t in random_routing(tokens, 2, 3))
    tile = GemmConfig(16, 64, 2, False, 4, 2)
    found = []
    for finish in (True, False):
        forced(finish, 3)
        y = linear.linear(x, dense, spec)
        z = fused_moe.fused_moe(x, router, ids, None, w13.present, w2.present, experts_spec, (tile, tile))
        found.append((y, z))
    assert seen == [True] * 3 + [False] * 3
    for one, other in zip(*found, strict=True):
        assert bool(one.isfinite().all())
        assert torch.equal(one, other)


def test_dense_layers_and_large_tiles_finish():
    """Tiles of up to 32 pairs of experts add the parts themselves."""
    shape = DownShape(64, 32, 1)
    for block_m in (16, 32, 64, 128):
        blocks = TokenBlocks(None, None, None, 2, block_m)
        dense, experts = (plan(shape, blocks, dense, True) for dense in (True, False))
        assert dense.finish == (block_m <= 64)  # larger tiles have no parts
        assert experts.finish == (block_m > 32)
        for how in (dense, experts):
            assert how.counters == (how.blocks * how.rank_tiles if how.finish else 0)
    assert plan(DownShape(0, 32, 1), blocks, True, True).counters == 0


@pytest.mark.parametrize("units", [1, 2, 3, 5, 11, 16, 32, 112])
def test_parts_hold_every_unit(units: int):
    for dense in (True, False):
        for block_m in (16, 32, 64, 128, 256):
            for count in (1, 3, 40):
                how = plan(DownShape(96, units, 4), TokenBlocks(None, None, None, count, block_m), dense, True)
                assert how.splits * how.chunk >= units
                assert 1 <= how.splits <= 16
                assert how.blocks * how.block_m == count * block_m


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 250])
def test_streams_and_graphs_have_their_own_counters(tokens: int):
    """Two streams at once, and one graph replayed beside them, many times."""
    weights, spec = random_linear([1024, 256, 256], [256, 128, 128], 2048, 64, 3)
    layer = ops.prepare_linear(LinearWeights(*(t.cuda() for t in weights)), spec, "triton")
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    first = ops.linear(x, layer, spec, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = ops.linear(x, layer, spec, "triton")
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                found.append(ops.linear(x, layer, spec, "triton"))
        with torch.cuda.stream(streams[2]):
            replayed.fill_(float("nan"))
            graph.replay()
        torch.cuda.synchronize()
        for one in (*found, replayed):
            assert torch.equal(one, first)
