"""Ways to serve a model with dummy weights: what its config.json says, and vLLM's choice of kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.serving.models import BASE, MODELS, gptq, humming, milo
from benchmarks.serving.shipped import shipped_format


class Contender(NamedTuple):
    """A way to serve a model.

    Attributes:
        quantization: ``quantization_config`` of a model by its name and its layers; None is bf16.
        moe_backend: vLLM's choice of MoE kernels.
        environment: variables of the process that serves it.
    """

    quantization: Callable[[str, int], dict[str, Any]] | None
    moe_backend: str = "auto"
    environment: Mapping[str, str] = MappingProxyType({})


CONTENDERS = {
    "milo": Contender(shipped_format),
    "milo-3bit-dense": Contender(shipped_format, environment={"VLLM_MILO_DENSE": "3bit"}),
    "milo-16bit-dense": Contender(shipped_format, environment={"VLLM_MILO_DENSE": "16bit"}),
    "milo-launched": Contender(shipped_format, environment={"VLLM_MILO_REPLAY": "0"}),
    "milo-given-routes": Contender(shipped_format, environment={"VLLM_MILO_ROUTING": "0"}),
    "milo-given-gates": Contender(shipped_format, environment={"VLLM_MILO_GATES": "0"}),
    "milo-small": Contender(lambda name, layers: shipped_format(name, layers, "small")),
    "milo-s1": Contender(lambda name, layers: milo(MODELS[name], 1 / 8, 16)),
    "milo-s2": Contender(lambda name, layers: milo(MODELS[name], 1 / 4, 32)),
    "milo-no-compensators": Contender(lambda name, layers: milo(MODELS[name], 0, 0)),
    "int4-g128": Contender(lambda name, layers: gptq(MODELS[name])),
    "marlin-int4-g128": Contender(lambda name, layers: gptq(MODELS[name]), "marlin"),
    "bf16": Contender(None),
    "humming-int4-g128": Contender(lambda name, layers: gptq(MODELS[name]), "humming"),
    "humming-uint3-g64": Contender(lambda name, layers: humming(MODELS[name])),
}
"""``milo`` and ``milo-small`` are the bits, groups and ranks by role of the presets ``balanced`` and ``small``;
``milo-3bit-dense`` keeps attention in 3 bits, of which the first has as much in 16 bits, and in 8 for few tokens, as
the device has room for; ``milo-16bit-dense`` has none in 8. ``milo-launched`` makes every launch anew where others are
made once more as they were recorded, ``milo-given-routes`` has vLLM's routers, and
``milo-given-gates`` vLLM's products of their gates.
``int4-g128`` is a GPTQ checkpoint by the kernels that vLLM chooses: for experts Marlin up to 0.26, and Humming on
Hopper in 0.33, where ``marlin-int4-g128`` asks for Marlin. Its dense layers are vLLM's choice in both (Machete on
Hopper)."""


def write_model(folder: Path, name: str, contender: str, layers: int) -> dict[str, Any]:
    """Write a folder with nothing but a config.json, for vLLM's dummy weights, and return its content."""
    config = BASE | MODELS[name].config | {"num_hidden_layers": layers}
    quantization = CONTENDERS[contender].quantization
    if quantization is not None:
        config["quantization_config"] = quantization(name, layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return config
