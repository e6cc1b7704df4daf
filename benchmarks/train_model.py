"""Train a small MoE on real text, so that demo, tests and accuracy tables have weights with structure.

    python benchmarks/train_model.py --preset bundled --data DATA --out OUT

DATA holds token ids (train.bin.xz and valid.bin, uint16) and the tokenizer they were made with. The preset
``bundled`` made tests/assets/tiny-qwen2-moe; it has a tokenizer of its own, so its text is encoded anew (with
``--encode-only`` into a data folder that later runs take, without a GPU). ``large`` is the
few-hundred-million-parameter model of the accuracy report. Training needs a GPU and takes minutes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

CONTEXT = 512


@dataclass(frozen=True)
class Preset:
    """A model's shape and how it is trained; ``vocabulary`` None keeps the data's tokenizer."""

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


PRESETS = {
    "bundled": Preset(128, 4, 4, 12, 3, 128, 256, 4096, epochs=3.0, batch=64, learning_rate=4e-3),
    "large": Preset(1024, 8, 16, 16, 2, 1024, 1024, None, epochs=2.0, batch=48, learning_rate=8e-4),
}


def main() -> None:
    """Train the preset and save model, tokenizer and a record of the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encode-only", action="store_true", help="write a data folder to OUT and stop")
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    preset = PRESETS[arguments.preset]
    tokenizer, train, valid = load_data(arguments.data, preset.vocabulary)
    if arguments.encode_only:
        save_data(arguments.out, tokenizer, train, valid)
        return
    model = build_model(preset, tokenizer).to(arguments.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {train.numel() / 1e6:.1f} M tokens")
    run_training(model, train, preset, arguments.max_steps)
    record = {
        "valid_loss": validation_loss(model, valid),
        "unigram_loss": unigram_loss(train, valid, len(tokenizer)),
        "tokens": train.numel(),
        "preset": arguments.preset,
    }
    print(record)
    model.to(torch.bfloat16).save_pretrained(arguments.out, max_shard_size="4GB")
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


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
        router_aux_loss_coef=0.01,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def run_training(model: Qwen2MoeForCausalLM, ids: torch.Tensor, preset: Preset, max_steps: int | None) -> None:
    """AdamW with warm-up and cosine decay, bf16 autocast over fp32 weights, random windows of the text."""
    device = model.device
    steps = int(preset.epochs * ids.numel() / (preset.batch * CONTEXT))
    steps = min(steps, max_steps) if max_steps else steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))),
    )
    ids = ids.to(device)
    start = time.monotonic()
    for step in range(steps):
        offsets = torch.randint(0, ids.numel() - CONTEXT, (preset.batch,), device=device)
        batch = ids[offsets[:, None] + torch.arange(CONTEXT, device=device)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)


@torch.inference_mode()
def validation_loss(model: Qwen2MoeForCausalLM, ids: torch.Tensor, windows: int = 128) -> float:
    """Return the mean loss in nats a token over windows of the held-out text, in float32."""
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
