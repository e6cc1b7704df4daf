"""Trains the routers of a Qwen2-MoE model whose experts were all active, so that a part of them imitates the whole.

Trained are routers, norms, the gates of shared experts and a scale of every expert, all kept in float32 while the model
computes in its own dtype. The loss is the KL divergence from the original's predictions, and a small term that
balances how much the experts of a layer are used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_milo.offline.learn.end_to_end import prediction_divergence

Tensors = dict[str, torch.Tensor]

SHARPNESS = 1.0
"""Of the first routers: logits a unit of an output's logarithmic size. On the bundled model with its routers set to 0,
80 steps at 1.0 ended nearer to the original than at 0.25, and with the load more even (2026-11-27)."""
RIDGE = 1e-3
"""Share of the mean of the inputs' second moments that is added to them where the first routers are fitted."""
RATES = {"norm.weight": 1e-3, "mlp.gate.weight": 1e-4, "shared_expert_gate.weight": 1e-4, "experts.scale": 2e-3}
"""Adam's learning rates, by the end of a tensor's name; those of norms count in units of their own size."""


@dataclass(frozen=True)
class TrainOptions:
    """How long and how fast routers are trained.

    Attributes:
        seconds: the schedule ends after this time ...
        steps: ... or so many steps, whichever comes first.
        batch: windows of a step.
        rate: multiplies all learning rates.
        balance: weight of the load-balancing term.
        seed: of the choice of windows.
    """

    seconds: float = 180.0
    steps: int = 100_000
    batch: int = 8
    rate: float = 1.0
    balance: float = 0.01
    seed: int = 0


def moe_blocks(model: Any) -> dict[str, Any]:
    """Return the MoE blocks of a model by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "shared_expert_gate")}


@torch.no_grad()
def first_routers(original: Any, windows: torch.Tensor, batch: int) -> Tensors:
    """Return router weights by name that foretell from a token which experts' outputs are large.

    Least squares on the logarithm of the outputs' sizes, less their means over the experts of a token and over the
    tokens of an expert, so that all experts are used alike.

    Args:
        original: in which all experts are active.
        windows: token ids, int64 [W, T].
        batch: windows that run at once.
    """
    fits = {name: _Fit(module.experts) for name, module in moe_blocks(original).items()}
    for part in windows.split(batch):
        original.model(part.to(original.device), use_cache=False)
    return {f"{name}.gate.weight": fit.close() for name, fit in fits.items()}


class _Fit:
    """Sums what the least squares of one layer need, until it is closed."""

    def __init__(self, experts: Any) -> None:
        self._handle = experts.register_forward_pre_hook(self._see)
        size, device = experts.down_proj.shape[1], experts.down_proj.device
        self._inputs = torch.zeros(size, size, device=device)
        self._cross = torch.zeros(size, experts.num_experts, device=device)
        self._input_sum = torch.zeros(size, device=device)
        self._target_sum = torch.zeros(experts.num_experts, device=device)
        self._tokens = 0

    def _see(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        states = args[0]
        sizes = []
        for gate_up, down in zip(module.gate_up_proj, module.down_proj, strict=True):
            gate, up = torch.nn.functional.linear(states, gate_up).chunk(2, dim=-1)
            output = torch.nn.functional.linear(module.act_fn(gate) * up, down)
            sizes.append(output.float().norm(dim=-1))
        target = torch.stack(sizes, dim=-1).clamp(min=1e-6).log()
        target = target - target.mean(-1, keepdim=True)
        rows = states.float()
        self._inputs += rows.T @ rows
        self._cross += rows.T @ target
        self._input_sum += rows.sum(0)
        self._target_sum += target.sum(0)
        self._tokens += len(rows)

    def close(self) -> torch.Tensor:
        """Stop watching and return the router's weight, float32 [E, H]."""
        self._handle.remove()
        cross = self._cross - torch.outer(self._input_sum, self._target_sum / self._tokens)
        inputs = self._inputs.double()
        inputs += torch.eye(len(inputs), device=inputs.device) * (RIDGE * inputs.diagonal().mean())
        return SHARPNESS * torch.linalg.solve(inputs, cross.double()).T.float()


class Trained:
    """The trained tensors in float32 by name, and the model that computes with them.

    Args:
        model: a causal LM of transformers; its own tensors follow after every step.
        begin: first values of some of the tensors.
        scale: first scale of every expert.
    """

    def __init__(self, model: Any, begin: Mapping[str, torch.Tensor], scale: float) -> None:
        model.requires_grad_(False)
        ends = tuple(RATES)
        self._live = {name: value for name, value in model.named_parameters() if name.endswith(ends)}
        self.masters = {name: begin.get(name, value).detach().float().clone() for name, value in self._live.items()}
        self.routing: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hooks = []
        for name, block in moe_blocks(model).items():
            scales = torch.full((block.experts.num_experts,), scale, device=model.device, requires_grad=True)
            self.masters[f"{name}.experts.scale"] = scales
            self._hooks.append(block.gate.register_forward_hook(self._scaled(scales)))
        for value in self._live.values():
            value.requires_grad_(True)
        self.write()

    def _scaled(self, scales: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
        """Return a hook that lets a router's weights count with the experts' scales, and keeps what it chose."""

        def hook(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, weights, chosen = output
            self.routing.append((logits, chosen))
            return logits, weights * scales[chosen].to(weights.dtype), chosen

        return hook

    @torch.no_grad()
    def write(self) -> None:
        """Round the tensors to those that the model computes with."""
        for name, value in self._live.items():
            value.copy_(self.masters[name])

    def take_gradients(self) -> None:
        """Hand the gradients of the model's tensors to those in float32."""
        for name, value in self._live.items():
            self.masters[name].grad = None if value.grad is None else value.grad.float()
            value.grad = None

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Return Adam's groups, a tensor each, with the rate they are to have at their fastest."""
        found = []
        for name, value in self.masters.items():
            peak = rate * next(of for end, of in RATES.items() if name.endswith(end))
            peak *= float(value.square().mean().sqrt()) if name.endswith("norm.weight") else 1
            found.append({"params": [value], "lr": 0.0, "peak": peak})
        return found

    def close(self) -> Tensors:
        """Stop watching and return the tensors, on the host."""
        for hook in self._hooks:
            hook.remove()
        return {name: value.detach().cpu() for name, value in self.masters.items()}


def train_routers(
    model: Any, original: Any, windows: torch.Tensor, begin: Mapping[str, torch.Tensor], options: TrainOptions
) -> Tensors:
    """Train a model of which a part of the experts is active, and return the trained tensors, float32 by name.

    The scale of expert e in block b is in ``b.experts.scale``; it belongs into down_proj.

    Args:
        model: a causal LM of transformers with fewer active experts than the original, normalized router weights.
        original: the same weights with all experts active.
        windows: token ids, int64 [W, T].
        begin: first values of some of the tensors; see :func:`first_routers`.
        options: how long and how fast.
    """
    config = model.config
    trained = Trained(model, begin, config.num_experts_per_tok / config.num_experts)
    adam = torch.optim.Adam(trained.groups(options.rate), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(options.seed)
    start, order = time.monotonic(), torch.empty(0, dtype=torch.int64)
    for step in range(options.steps):
        done = max(step / options.steps, (time.monotonic() - start) / options.seconds)
        if done >= 1:
            break
        if len(order) < options.batch:
            order = torch.randperm(len(windows), generator=generator)
        ids, order = windows[order[: options.batch]].to(model.device), order[options.batch :]
        for group in adam.param_groups:
            group["lr"] = group["peak"] * min(1.0, 20 * done + 0.05) * math.cos(math.pi / 2 * done)
        trained.routing.clear()
        divergence = prediction_divergence(model, original, ids)
        balance = torch.stack([imbalance(*routing) for routing in trained.routing]).mean()
        (divergence + options.balance * balance).backward()
        trained.take_gradients()
        adam.step()
        adam.zero_grad()
        trained.write()
        if step % 50 == 0:
            print(f"step {step:5d}, {time.monotonic() - start:5.0f} s: KL {divergence:.4f}, imbalance {balance:.4f}")
    return trained.close()


def imbalance(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return 0 where a layer's experts are used alike, up to the number of experts less 1.

    Args:
        logits: of the router, [T, E].
        chosen: experts of each token, int64 [T, K].
    """
    number = logits.shape[-1]
    used = torch.bincount(chosen.flatten(), minlength=number) / chosen.numel()
    return number * (used * logits.float().softmax(-1).mean(0)).sum() - 1
