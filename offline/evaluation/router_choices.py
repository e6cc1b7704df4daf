"""Which experts the router of a layer chooses for each token, and how often two models choose differently."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from vllm_milo.names import leaf_of


@contextlib.contextmanager
def router_choices(layer: torch.nn.Module, home: torch.device) -> Iterator[list[torch.Tensor]]:
    """Give a list that each run of a layer adds its tokens' experts to, in order of their numbers, int16 [T, K].

    It stays empty where the layer has no routed experts that transformers calls with what the router chose.

    Args:
        layer: runs inside the context.
        home: where the choices are kept.
    """
    seen: list[torch.Tensor] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = args[1] if len(args) > 1 else kwargs.get("top_k_index")
        if isinstance(chosen, torch.Tensor) and chosen.dim() == 2 and not chosen.is_floating_point():
            seen.append(chosen.sort(-1).values.to(torch.int16).to(home))

    experts = [module for name, module in layer.named_modules() if leaf_of(name) == "experts"]
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in experts]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def changed_choices(mine: list[torch.Tensor], theirs: list[torch.Tensor], windows: int) -> torch.Tensor | None:
    """Return the share of each window's tokens whose set of experts differs, float64 [W]; None where it is unknown.

    Args:
        mine: what :func:`router_choices` gave for one model, over all windows.
        theirs: the same for the other.
        windows: their number.
    """
    if not mine or not theirs:
        return None
    left, right = torch.cat(mine), torch.cat(theirs)
    if left.shape != right.shape or len(left) % windows:
        return None
    return (left != right).any(-1).view(windows, -1).double().mean(-1)
