"""Serves two layers of families, as wide as their makers' models, with vLLM, and prints how far log-probabilities are
from the dequantized model's in transformers: ``python tests/wide_families.py [--small] [FAMILY...]``.

On a GPU as users run it: bfloat16, CUDA graphs for batches of all sizes. ``--small`` is for CPUs: a fraction of the
width, eager. Checkpoints are those of ``--preset fast`` and of rank 16 on every matrix; the control is what the latter
stands for, unquantized.

In such width 16 bits move log-probabilities as much as small ranks do. So the table has, beside mean and worst
difference in nats, which share of what compensators change is missing, of routed experts' and of all others': 0 where
they are right, 1 where they are left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import hand_made
import torch
import vllm_runner
from served_families import ENGINE
from tiny_families import TINY, has_class, make_family
from tiny_models import logprobs, make_prompts
from transformers import AutoConfig
from vllm_jobs import DEVICE, job

from vllm_milo.kernels.packing import dequantize
from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors
from vllm_milo.offline.cli import main as milo
from vllm_milo.offline.source.foreign import load_config
from vllm_milo.offline.source.whole_model import fill_model, model_class
from vllm_milo.validation import read_format


class Wide(NamedTuple):
    """Changes of a tiny family's configuration: to its makers' width, and to a like of it for CPUs."""

    true: dict[str, Any]
    small: dict[str, Any]


WIDE = {
    "deepseek": Wide(  # DeepSeek-MoE-16B
        {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
        | {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408}
        | {"intermediate_size": 10944, "norm_topk_prob": False},
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
        | {"n_routed_experts": 16, "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 192}
        | {"intermediate_size": 704, "norm_topk_prob": False},
    ),
    "qwen3_5_moe_text": Wide(  # Qwen3.5-35B-A3B
        {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256}
        | {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
        | {"shared_expert_intermediate_size": 512, "linear_num_key_heads": 16, "linear_num_value_heads": 32}
        | {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        | {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 128}
        | {"shared_expert_intermediate_size": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 8}
        | {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    ),
}
OPTIONS = {
    "fast": ["--preset", "fast"],
    "rank 16": ["--calibration", "none", "--ranks", "uniform=16", "--max-rounds", "2"],
}
CONTROL = "control"
LOUDER = r"mlp\.gate\.weight$|down_proj"
"""What is eight times as loud: else FFNs would change little beside what passes them, and experts weigh the same."""
GRAPHS = {
    "enforce_eager": False,
    "dtype": "bfloat16",
    "trust_remote_code": True,
    "additional_config": {"gdn_prefill_backend": "triton"},  # on Hopper FlashInfer's, which is not everywhere
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]},
}
"""Of vLLM on GPUs: prompts, too, are run by graphs."""


class Apart(NamedTuple):
    """How far served log-probabilities are from the truth.

    Attributes:
        mean: absolute difference, in nats.
        worst: largest difference.
        missing: share of what compensators change that is missing, of routed experts' and of all others'.
    """

    mean: float
    worst: float
    missing: tuple[float, float]

    @classmethod
    def of(cls, served: torch.Tensor, exact: torch.Tensor, without: list[torch.Tensor]) -> Apart:
        """Compare log-probabilities with the truth, and that with what it were without compensators of each kind."""
        error, changes = served - exact, torch.stack([values - exact for values in without], 1)
        shares = torch.linalg.lstsq(changes, error[:, None]).solution.flatten().tolist()
        return cls(float(error.abs().mean()), float(error.abs().max()), (shares[0], shares[1]))

    def __str__(self) -> str:
        return f"{self.mean:.1e} ({self.worst:.1e}) | {self.missing[0]:.2f}, {self.missing[1]:.2f}"


class Found(NamedTuple):
    """What was measured by what was served, and vLLM's log."""

    apart: dict[str, Apart]
    log: str


def measure(name: str, root: Path, small: bool) -> Found:
    """Make a model, convert and serve it, and compare."""
    changes = WIDE[name].small if small else WIDE[name].true
    source = make_family(name, root / "source", device=DEVICE, louder=LOUDER, **changes)
    _say(f"{name} was made")
    models = {kind: _convert(source, root / kind, options) for kind, options in OPTIONS.items()}
    *_, ranked = OPTIONS
    plain = hand_made.dequantized(models[ranked], root / CONTROL, DEVICE)
    _say("converted")
    outputs, log = _serve(models | {CONTROL: plain}, TINY[name].dtype, root / "outputs")
    apart = {}
    for kind, folder in models.items():
        prompts, mine = make_prompts(folder), [kind, CONTROL] if kind == ranked else [kind]
        assert not any("error" in outputs[served] for served in mine), [outputs[served] for served in mine]
        values: dict[str, list[torch.Tensor]] = {served: [] for served in mine}
        for left_out in (_none, _routed, _others):
            model = _load(name, folder, left_out)
            for served in mine:
                values[served].append(_truth(model, prompts, outputs[served]))
            del model
        _say(f"{kind} was computed")
        for served in mine:
            exact, *without = values[served]
            apart[served] = Apart.of(_served(outputs[served]), exact, without)
    return Found(apart, log)


def _convert(source: Path, out: Path, options: Iterable[str]) -> Path:
    code = milo(["quantize", str(source), "-o", str(out), "--quiet", *options])
    assert code == 0, f"milo quantize ended with {code}"
    return out


def _serve(models: dict[str, Path], dtype: str, root: Path) -> tuple[dict[str, Any], str]:
    """Return vLLM's outputs by model, and its logs; ``dtype`` is of CPUs.

    On a GPU all start at once: a start takes minutes, most of which are spent on compiling.
    """
    engine = ENGINE | {"dtype": dtype} if DEVICE == "cpu" else GRAPHS
    outputs: dict[str, Any] = {}

    def serve(name: str) -> str:
        place = root / name
        place.mkdir(parents=True)
        outputs.update(vllm_runner.run(job({name: models[name]}, **engine), place, timeout=1500))
        _say(f"{name} was served")
        return (place / "vllm.log").read_text()

    with ThreadPoolExecutor(1 if DEVICE == "cpu" else len(models)) as pool:
        return outputs, "".join(pool.map(serve, models))


def _say(what: str) -> None:
    """Print to stderr what is done, and the time of day: in true width each part takes minutes."""
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


def _served(outputs: list[dict[str, Any]]) -> torch.Tensor:
    """Return vLLM's log-probabilities of all prompts and answers."""
    return torch.tensor([value for one in outputs for value in (*one["prompt_logprobs"], *one["logprobs"])]).double()


def _truth(model: Any, prompts: list[list[int]], outputs: list[dict[str, Any]]) -> torch.Tensor:
    """Return a model's log-probabilities of the same."""
    values = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor(prompt + output["generated"])
        values.append(logprobs(model, ids.tolist())[:-1].gather(1, ids[1:, None]).flatten())
    return torch.cat(values)


def _none(module: str) -> bool:
    return False


def _routed(module: str) -> bool:
    return ".experts." in module


def _others(module: str) -> bool:
    return ".experts." not in module


def _load(name: str, folder: Path, left_out: Callable[[str], bool]) -> Any:
    """Return the dequantized model of a checkpoint in transformers, in float32, without the compensators left out."""
    fmt, settings = read_format(folder)
    stored = DequantizedTensors(folder, fmt, torch.float32, DEVICE)
    state = {key: stored.stored(key) for key in stored.others}
    for module in stored.matrices:
        if left_out(module):
            held = stored.packed(module)
            codes = (held[leaf] for leaf in ("weight_packed", "weight_scale", "weight_zero"))
            state[f"{module}.weight"] = dequantize(*codes, fmt.module_group_size(module)).cpu()
        else:
            state[f"{module}.weight"] = stored.weight(module).cpu()
    if has_class(name):
        config = load_config(folder)
        del config.quantization_config
    else:
        config, state = _as_qwen2(settings, state)
    model = fill_model(model_class(config, folder), folder, config, state, torch.float32)
    return model.to(DEVICE).eval()


def _as_qwen2(settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return config and weights of the Qwen2-MoE that computes what a DeepSeek-MoE does.

    Its gate of shared experts, 0, halves what they give; they are twice as loud.
    """
    held = {}
    for key, values in state.items():
        held[key.replace("shared_experts", "shared_expert")] = values * (2 if "shared_experts.down_proj" in key else 1)
        if key.endswith("mlp.gate.weight"):
            held[key.replace("gate", "shared_expert_gate")] = torch.zeros_like(values[:1])
    own = ("model_type", "architectures", "auto_map", "quantization_config", "transformers_version")
    config = {key: value for key, value in settings.items() if key not in own} | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": settings["n_routed_experts"],
        "shared_expert_intermediate_size": settings["n_shared_experts"] * settings["moe_intermediate_size"],
        "mlp_only_layers": [0],
        "qkv_bias": False,
    }
    return AutoConfig.for_model("qwen2_moe", **config), held


def main() -> None:
    """Print the table of the families named on the command line, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    print(
        "| model_type | served | mean (worst) | missing share of compensators: experts', others' |\n|---|---|---|---|"
    )
    for name in arguments.families or WIDE:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, Path(folder), arguments.small)
        for kind, apart in found.apart.items():
            print("|", name, "|", kind, "|", apart, "|", flush=True)


if __name__ == "__main__":
    main()
