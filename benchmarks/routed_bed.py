"""Makes a model that routes of one whose experts are all active, so that routing errors can be measured on it.

    python -m benchmarks.routed_bed MODEL -o OUT [--text FILE ...] [--save FILE]
    python -m benchmarks.routed_bed MODEL -o OUT --apply FILE

MODEL is a Qwen2-MoE folder whose routers are 0, so that every expert counts alike: a dense model cut into experts. Only
half of them (``--active``) stay active; routers are trained to choose them so that the model predicts what it did
(:mod:`benchmarks.router_training`), on the packaged text and on FILEs. OUT has MODEL's files. ``--save``
writes the trained tensors alone, of which ``--apply`` makes the same OUT again, with the same ``--active``. Prints the
KL divergence from MODEL and perplexity on windows of the packaged text that nothing was trained on, and the shares of
the tokens' choices that the least and the most used expert have.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.router_training import Tensors, TrainOptions, first_routers, train_routers
from vllm_milo.offline.calibration.choose import PACKAGED, WINDOW, TextOptions, calibration_windows
from vllm_milo.offline.evaluation.divergence import divergence, open_streamed
from vllm_milo.offline.evaluation.expert_use import count_experts_used
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.offline.source.streamed_model import use_grouped_experts
from vllm_milo.offline.source.whole_model import load_source_model

MANY = 1 << 14
"""More windows than a text has."""
FIRST_WINDOWS = 64
"""Windows that the first routers are fitted on."""


def main() -> None:
    """Make the model and say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--active", type=int, default=None, help="experts of a token (default: half of them)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="train on these too")
    parser.add_argument("--save", type=Path, help="write the trained tensors here too")
    parser.add_argument("--apply", type=Path, help="do not train: take the trained tensors from here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=TrainOptions.seconds)
    parser.add_argument("--steps", type=int, default=TrainOptions.steps)
    parser.add_argument("--batch", type=int, default=TrainOptions.batch)
    parser.add_argument("--rate", type=float, default=TrainOptions.rate, help="multiplies all learning rates")
    parser.add_argument("--balance", type=float, default=TrainOptions.balance, help="weight of the load's balance")
    parser.add_argument("--measure-windows", type=int, default=32, help="kept from training; 0 measures nothing")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists")
    config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    active = arguments.active or config["num_experts"] // 2
    trained = load_file(arguments.apply) if arguments.apply else train(arguments, active)
    if arguments.save:
        save_file(trained, arguments.save)
    write_bed(arguments.model, arguments.output, trained, active)
    if arguments.measure_windows:
        measure(arguments)


def train(arguments: argparse.Namespace, active: int) -> Tensors:
    """Return the trained tensors."""
    reader = ModelReader(arguments.model)
    packaged = calibration_windows(reader, PACKAGED, TextOptions(MANY))
    texts = [calibration_windows(reader, str(text), TextOptions(MANY)) for text in arguments.text]
    windows = torch.cat([packaged[arguments.measure_windows :], *texts])
    print(f"{len(windows)} windows of {windows.shape[1]} tokens")
    dtype = _dtype(arguments.device)
    original = load_source_model(arguments.model, dtype, arguments.device).requires_grad_(False)
    model = load_source_model(arguments.model, dtype, arguments.device)
    for one in (model, original):
        if arguments.device != "cpu":
            use_grouped_experts(one)
    set_active(model, active)
    begin = first_routers(original, windows[:FIRST_WINDOWS], arguments.batch)
    pace = {name: getattr(arguments, name) for name in ("seconds", "steps", "batch", "rate", "balance")}
    return train_routers(model, original, windows, begin, TrainOptions(**pace))


def set_active(model: Any, active: int) -> None:
    """Let the routers of a model in memory choose so many experts, whose weights add up to 1."""
    model.config.num_experts_per_tok, model.config.norm_topk_prob = active, True
    for module in model.modules():
        if hasattr(module, "norm_topk_prob") and hasattr(module, "top_k"):
            module.top_k, module.norm_topk_prob = active, True


def write_bed(source: Path, out: Path, trained: Mapping[str, torch.Tensor], active: int) -> None:
    """Write a model folder with the source's files: trained tensors in place, experts' scales in their down_proj."""
    out.mkdir(parents=True)
    left = {name for name in trained if not name.endswith(".experts.scale")}
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            left -= tensors.keys()
            changed = {name: _new(name, values, trained) for name, values in tensors.items()}
            save_file(changed, out / path.name, {"format": "pt"})
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
    if left:
        raise SystemExit(f"{source}: has no {min(left)}; the trained tensors are another model's")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"num_experts_per_tok": active, "norm_topk_prob": True}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _new(name: str, values: torch.Tensor, trained: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a tensor of the new model, of the source's dtype."""
    if name in trained:
        return trained[name].to(values.dtype)
    block, _, rest = name.partition(".experts.")
    expert, _, leaf = rest.partition(".")
    scales = trained.get(f"{block}.experts.scale")
    if scales is None or leaf != "down_proj.weight":
        return values
    return (values.float() * scales[int(expert)]).to(values.dtype)


def measure(arguments: argparse.Namespace) -> None:
    """Print how far the new model is from the source, and how evenly its experts are used."""
    options = TextOptions(arguments.measure_windows)
    windows = calibration_windows(ModelReader(arguments.model), PACKAGED, options)
    device, dtype = torch.device(arguments.device), _dtype(arguments.device)
    pair = [open_streamed(folder, device, dtype) for folder in (arguments.output, arguments.model)]
    found = divergence(pair[0], pair[1], windows)
    counts = count_experts_used(load_source_model(arguments.output, dtype, arguments.device), windows.flatten())
    shares = torch.stack([torch.tensor(of) / sum(of) for of in counts.values() if sum(of)])
    print(
        f"KL {found.kl:.4f}, top-1 {found.top1:.4f}, perplexity {found.perplexity:.3f} "
        f"(original {found.reference_perplexity:.3f}) on {found.tokens} tokens in windows of {WINDOW} or less\n"
        f"share of a layer's choices: least used expert {shares.min():.4f}, most used {shares.max():.4f}, "
        f"even {1 / shares.shape[1]:.4f}"
    )


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


if __name__ == "__main__":
    main()
