"""Routes that do not depend on dummy weights.

What random codes of one format and of another compute differs, and so does where their routers send tokens: to few
experts or to many, which decides the time of a layer. With these routes all contenders have the same. A router still
computes its logits; then rows of a table take their place, which costs nothing: a token's row is its place in the step.

The table's experts are not equally liked, as those of trained models are not: of 128 experts of which a token takes 8,
16 tokens reach 68 and 64 tokens 106, and the busiest has six times the mean (without preferences 83, 126 and 2.5 to 4).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("vllm.milo")

ROWS = 2**15
"""Of the table; a step may have half as many tokens."""
PREFERENCE = 0.5
"""Standard deviation of what an expert's logits have in common, where a token's own part has 1."""
SPREAD = 509
"""Rows between those of one layer and of the next, so that layers have other routes."""
SAID = "routers choose by a table of the benchmark"
"""What the log says once they do."""


@cache
def logits_table(experts: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits, [ROWS, experts], the same in each process."""
    generator = torch.Generator().manual_seed(experts)
    liked = PREFERENCE * torch.randn(experts, generator=generator)
    logger.warning(SAID)
    return (torch.randn(ROWS, experts, generator=generator) + liked).to(device, dtype)


class Table:
    """Gives each router rows of its own, by the order in which routers first ask."""

    def __init__(self) -> None:
        self.starts: dict[int, int] = {}

    def replace(self, router: object, logits: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of a router's logits [tokens, experts].

        Raises:
            ValueError: a step has more tokens than there are rows.
        """
        tokens, experts = logits.shape
        if tokens > ROWS // 2:
            raise ValueError(f"a step of {tokens} tokens, but the benchmark's table of routes has room for {ROWS // 2}")
        start = self.starts.setdefault(id(router), len(self.starts) * SPREAD % (ROWS // 2))
        return logits_table(experts, logits.device, logits.dtype)[start : start + tokens]


def replacing(select: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``select(router, hidden_states, router_logits, ..)`` with other logits."""
    table = Table()

    @wraps(select)
    def choose(router: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return select(router, hidden_states, table.replace(router, router_logits), *rest, **named)

    return choose


def replacing_logits(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``prepare(router, router_logits)``, which layers that choose themselves call, with other logits."""
    table = Table()

    @wraps(prepare)
    def replaced(router: Any, router_logits: torch.Tensor) -> Any:
        return prepare(router, table.replace(router, router_logits))

    return replaced


def require_table(log: Path, otherwise: str) -> None:
    """Refuse a server whose routers did not choose by the table while it was started.

    Args:
        log: of the server, or of a process that runs the model itself.
        otherwise: what a user may do instead.

    Raises:
        RuntimeError: the log does not say that they did.
    """
    if SAID not in log.read_text(encoding="utf-8", errors="replace"):
        raise RuntimeError(f"{log.name} does not say that {SAID}: this vLLM selects experts elsewhere; {otherwise}")


def route_alike() -> None:
    """Make all routers of this process choose by the table.

    Raises:
        AttributeError: this vLLM's routers select elsewhere.
    """
    from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter

    setattr(FusedMoERouter, "select_experts", replacing(FusedMoERouter.select_experts))  # noqa: B010 (mypy)
    if (prepare := getattr(FusedMoERouter, "prepare_monolithic_logits", None)) is not None:
        setattr(FusedMoERouter, "prepare_monolithic_logits", replacing_logits(prepare))  # noqa: B010
