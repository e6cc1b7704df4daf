"""Routes of a table in place of what dummy weights choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving.dummy.routing import PREFERENCE, ROWS, SAID, logits_table, replacing, require_table

CPU = torch.device("cpu")


class Router:
    """Selects as vLLM's do."""

    def select_experts(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, top_k: int = 2) -> Any:
        return router_logits.topk(top_k).indices


def test_routers_choose_by_rows_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Router, "select_experts", replacing(Router.select_experts))
    first, second = Router(), Router()
    x = torch.zeros(40, 64)
    chosen = first.select_experts(x, torch.zeros(40, 8))
    assert torch.equal(chosen, first.select_experts(hidden_states=x, router_logits=torch.randn(40, 8), top_k=2))
    assert torch.equal(chosen[:5], first.select_experts(x[:5], torch.zeros(5, 8)))
    assert not torch.equal(chosen, second.select_experts(x, torch.zeros(40, 8)))
    assert len(chosen.unique()) == 8
    with pytest.raises(ValueError, match=f"a step of {ROWS // 2 + 1} tokens"):
        first.select_experts(x, torch.zeros(ROWS // 2 + 1, 8))


def test_a_table_is_the_same_in_each_process_and_prefers_some_experts():
    table = logits_table(16, CPU, torch.float32)
    logits_table.cache_clear()
    assert torch.equal(table, logits_table(16, CPU, torch.float32))
    assert table.shape == (ROWS, 16)
    assert table.std(0).mean().item() == pytest.approx(1, abs=0.02)
    assert PREFERENCE / 2 < table.mean(0).std().item() < 2 * PREFERENCE


def test_vllm_selects_where_the_table_is_put(monkeypatch: pytest.MonkeyPatch):
    router = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.fused_moe_router")
    from benchmarks.serving.dummy.routing import route_alike

    monkeypatch.setattr(router.FusedMoERouter, "select_experts", router.FusedMoERouter.select_experts)
    route_alike()
    assert hasattr(router.FusedMoERouter.select_experts, "__wrapped__")
    base = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.base_router").BaseRouter
    assert base.select_experts is router.FusedMoERouter.select_experts


def test_a_server_that_chose_otherwise_is_refused(tmp_path: Path):
    log = tmp_path / "milo.log"
    log.write_text("nothing of the kind")
    with pytest.raises(RuntimeError, match=r"milo\.log does not say"):
        require_table(log, "--own-routes")
    log.write_text(f"WARNING: {SAID}\n")
    require_table(log, "--own-routes")
