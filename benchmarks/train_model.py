"""Train a small MoE on real text, so that demo, tests and accuracy tables have weights with structure.

    python -m benchmarks.train_model --preset bundled --data DATA --out OUT

DATA holds token ids (train.bin.xz and valid.bin, uint16) and the tokenizer they were made with. The preset
``bundled`` made tests/assets/tiny-qwen2-moe; it has a tokenizer of its own, so its text is encoded anew (with
``--encode-only`` into a data folder that later runs take, without a GPU). ``large`` is the
few-hundred-million-parameter model of accuracy/large_model.py, ``smoke`` a minute's check of all that on a CPU.
Training of the others needs a GPU and takes minutes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

CONTEXT = 512


@dataclass(frozen=True)
class Preset:
    """A model's shape and how it is trained; ``vocabulary`` None keeps the data's tokenizer.

    ``spread`` is the standard deviation of the first, random weights. What training leaves of them is noise on which
    compensators do nothing, and minutes of training leave much of it; DeepSeek-MoE begins at 0.006.
    """

    hidden: int
    layers: int
    heads: int
    experts: int
    top_k: int
    expert_size: int
    shared_size: int
    vocabulary: int | None
    epochs: float
    batch: int
    learning_rate: float
    spread: float = 0.02


PRESETS = {
    "bundled": Preset(128, 4, 4, 12, 3, 128, 256, 4096, epochs=3.0, batch=64, learning_rate=4e-3),
    "large": Preset(768, 8, 12, 16, 2, 768, 768, None, epochs=3.0, batch=32, learning_rate=1e-3, spread=0.006),
    "smoke": Preset(128, 2, 4, 4, 2, 128, 128, None, epochs=0.005, batch=8, learning_rate=4e-3),
}


def main() -> None:
    """Train the preset and save model, tokenizer and a record of the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encode-only", action="store_true", help="write a data folder to OUT and stop")
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--train-seconds", type=float, default=math.inf, help="end the schedule after this time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    if arguments.encode_only:
        save_data(arguments.out, *load_data(arguments.data, preset.vocabulary))
        return
    limits = Limits(arguments.max_steps, arguments.train_seconds)
    train_and_save(arguments.preset, arguments.data, arguments.out, limits, arguments.device, arguments.seed)


class Limits(NamedTuple):
    """What ends training before the preset's epochs: steps, or seconds since its start."""

    steps: int | None = None
    seconds: float = math.inf


def train_and_save(
    name: str, data: Path, out: Path, limits: Limits, device: str = "cuda", seed: int = 0
) -> dict[str, Any]:
    """Train a preset, save model, tokenizer and training.json into ``out``; return what training.json holds."""
    torch.manual_seed(seed)
    preset = PRESETS[name]
    tokenizer, train, valid = load_data(data, preset.vocabulary)
    model: Any = build_model(preset, tokenizer)
    model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {train.numel() / 1e6:.1f} M tokens", flush=True)
    start = time.monotonic()
    record: dict[str, Any] = {"preset": name, "parameters": parameters, "tokens": train.numel()}
    record |= run_training(model, train, preset, limits)
    record |= {"seconds": round(time.monotonic() - start, 1), "valid_loss": validation_loss(model, valid)}
    record["unigram_loss"] = unigram_loss(train, valid, len(tokenizer))
    print(record, flush=True)
    model.save_pretrained(out, max_shard_size="4GB")
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def load_data(folder: Path, vocabulary: int | None) -> tuple[PreTrainedTokenizerFast, torch.Tensor, torch.Tensor]:
    """Return the tokenizer and the ids of both texts, encoded anew if a vocabulary is asked for."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    train = np.frombuffer(lzma.decompress((folder / "train.bin.xz").read_bytes()), np.uint16)
    valid = np.fromfile(folder / "valid.bin", np.uint16)
    if vocabulary in (None, len(tokenizer)):
        return tokenizer, torch.from_numpy(train.astype(np.int64)), torch.from_numpy(valid.astype(np.int64))
    texts = [_documents(tokenizer, ids) for ids in (train, valid)]
    small = train_tokenizer(texts[0], vocabulary)
    return small, _encode(small, texts[0]), _encode(small, texts[1])


def save_data(folder: Path, tokenizer: PreTrainedTokenizerFast, train: torch.Tensor, valid: torch.Tensor) -> None:
    """Write a data folder as :func:`load_data` reads it."""
    tokenizer.save_pretrained(folder / "tokenizer")
    with lzma.open(folder / "train.bin.xz", "wb", preset=4) as file:
        file.write(train.numpy().astype(np.uint16).tobytes())
    valid.numpy().astype(np.uint16).tofile(folder / "valid.bin")


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of the given size."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        documents, vocab_size=vocabulary, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def build_model(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    """Return the untrained model of a preset."""
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        intermediate_size=preset.shared_size,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        num_experts=preset.experts,
        num_experts_per_tok=preset.top_k,
        moe_intermediate_size=preset.expert_size,
        shared_expert_intermediate_size=preset.shared_size,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=preset.spread,
        router_aux_loss_coef=0.01,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def run_training(model: Any, ids: torch.Tensor, preset: Preset, limits: Limits) -> dict[str, float | int]:
    """Train in place: AdamW with warm-up and cosine decay, over shuffled windows, each once an epoch.

    Model and gradients are bf16, the optimizer's weights fp32: grouped GEMMs of experts are fast in bf16 only, and
    autocast does not reach them. The schedule follows steps or time, whichever is further, so that it always decays
    to its end. Leaves the model in bf16.

    Returns:
        steps taken, epochs, the last loss, and :func:`start_share`.
    """
    device = model.device
    steps = max(1, int(preset.epochs * ids.numel() / (preset.batch * CONTEXT)))
    steps = min(steps, limits.steps) if limits.steps else steps
    warmup = min(100, max(1, steps // 20))
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    starts = [master.clone() for master in masters]
    model.to(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        masters, lr=preset.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    batches = shuffled_batches(ids.to(device), preset.batch)
    start = time.monotonic()
    step, done, loss = 0, 0.0, torch.zeros(())
    while done < 1:
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        for group in optimizer.param_groups:
            group["lr"] = preset.learning_rate * schedule(done, (step + 1) / warmup)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
        model.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)
        step += 1
        done = max(step / steps, (time.monotonic() - start) / limits.seconds)
    epochs = step * preset.batch * CONTEXT / ids.numel()
    print(f"step {step} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)
    share = start_share(starts, masters)
    return {"steps": step, "epochs": round(epochs, 3), "train_loss": loss.item(), "start_share": share}


def start_share(starts: list[torch.Tensor], ends: list[torch.Tensor]) -> float:
    """Return the share of the matrices' squared norm that lies along what they were before training."""
    along, total = 0.0, 0.0
    for start, end in zip(starts, ends, strict=True):
        if start.dim() > 1:
            along += float((start * end).sum().square() / start.square().sum().clamp(min=1e-30))
            total += float(end.square().sum())
    return round(along / total, 4)


def schedule(done: float, rise: float, floor: float = 0.02) -> float:
    """Return the learning rate's factor: ``rise`` while that is below a cosine from 1 down to ``floor``."""
    return min(rise, floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def shuffled_batches(ids: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    """Yield batches of windows [batch, CONTEXT] without end; in each epoch every window once, cut anew."""
    while True:
        offset = int(torch.randint(0, CONTEXT, ()))
        number = (ids.numel() - offset) // CONTEXT
        windows = ids[offset : offset + number * CONTEXT].view(number, CONTEXT)
        order = torch.randperm(number).to(ids.device)
        for start in range(0, number - batch + 1, batch):
            yield windows[order[start : start + batch]]


@torch.inference_mode()
def validation_loss(model: Qwen2MoeForCausalLM, ids: torch.Tensor, windows: int = 128) -> float:
    """Return the mean loss in nats a token over windows of the held-out text, in the model's dtype."""
    losses = [
        model(input_ids=window, labels=window, use_cache=False, output_router_logits=False).loss.item()
        for window in ids[: windows * CONTEXT].view(-1, 1, CONTEXT).to(model.device)
    ]
    return sum(losses) / len(losses)


def unigram_loss(train: torch.Tensor, valid: torch.Tensor, vocabulary: int) -> float:
    """Return the loss in nats a token of the best model that ignores context."""
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[valid].mean())


def _documents(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> list[str]:
    ends = np.flatnonzero(ids == tokenizer.eos_token_id) + 1
    parts = [part.tolist() for part in np.split(ids, ends) if part.size > 1]
    return tokenizer.batch_decode(parts, skip_special_tokens=True)


def _encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    start, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    return torch.tensor([token for document in encoded for token in start + document + end])


if __name__ == "__main__":
    main()
