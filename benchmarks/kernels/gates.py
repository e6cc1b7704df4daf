"""Times a router's gate and its choice with the layer of experts after them: vLLM's launches against ours.

    python -m benchmarks.kernels.gates -o out/gates.json
    python -m benchmarks.kernels.gates -o out/gates.json --models mixtral --tokens 1,16

A norm of x comes first, as in a model, so that a gate which starts early follows a kernel that does not ask for it.
``router`` is the library's gate, vLLM's choice and a layer that is given routes (on GPUs with vLLM); ``library`` the
library's gate and a layer that chooses itself; the others are gates by our tiles before such a layer. All are timed
twice in turns. A layer's experts are larger than L2, so that each gate comes from memory. Logits of each tile are
compared with the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch

from benchmarks.kernels.run import point_parser, record_rows, relative_error
from benchmarks.records import markdown_table
from vllm_milo.kernels.launch import shared_memory
from vllm_milo.kernels.serving.dense.wide import SPREAD_TILES, WideTile, wide_linear, wide_tile
from vllm_milo.kernels.serving.fused_moe import fused_moe, routed_moe
from vllm_milo.kernels.tuning.layer import Layer
from vllm_milo.kernels.tuning.timing import CALLS_IN_GRAPH, time_calls
from vllm_milo.kernels.weights import MoEShape

MODELS = {
    "qwen3": MoEShape(128, 8, 2048, 768, (64, 64), (32, 16), 2),
    "mixtral": MoEShape(8, 2, 4096, 14336, (64, 64), (128, 64), 2),
    "tiny": MoEShape(4, 2, 128, 64, (64, 64), (32, 16), 2),
}
"""The experts of Qwen3-30B-A3B and of Mixtral-8x7B, with the default's groups and ranks."""
OTHERS = (
    WideTile(16, 1024, 8, 4),
    WideTile(16, 1024, 8, 3),
    WideTile(16, 512, 8, 4),
    WideTile(16, 2048, 8, 2),
    WideTile(16, 256, 2, 5),
    WideTile(16, 512, 4, 3),
)
"""Tiles that are timed beside those in use."""
TURNS = 2
MAX_ERROR = 0.01
DTYPE = torch.bfloat16
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Call = Callable[[int], torch.Tensor]


def by_tile(x: torch.Tensor, weight: torch.Tensor, tile: WideTile) -> torch.Tensor:
    """Return a gate's logits, by our kernel."""
    return wide_linear(x, [weight], None, tile)


def tiles(tokens: int, device: torch.device) -> Iterator[WideTile]:
    """Yield the tiles that are timed: all that fit into shared memory."""
    for tile in (*SPREAD_TILES.values(), *OTHERS):
        if tile.loads(tokens, False) <= shared_memory(device):
            yield tile


def vllm_choice() -> Callable[..., None] | None:
    """Return vLLM's operator that chooses experts by a softmax, or None without it or a GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        from vllm._custom_ops import topk_softmax
    except ImportError:
        return None
    return topk_softmax


class Gated:
    """A layer of experts behind a norm and a gate, with inputs of so many tokens."""

    def __init__(self, layer: Layer, tokens: int) -> None:
        shape, device = layer.shape, layer.device
        self.layer, self.top_k = layer, shape.top_k
        self.inputs = layer.inputs(tokens).x
        wide = [torch.randn(shape.experts, shape.hidden, device=device) for _ in range(CALLS_IN_GRAPH)]
        self.gates = [(weight * shape.hidden**-0.5).to(DTYPE) for weight in wide]
        self.gain = torch.ones(shape.hidden, dtype=DTYPE, device=device)
        self.padding = torch.zeros(tokens, dtype=torch.bool, device=device)
        self.weights = [pair for _, pair in zip(range(CALLS_IN_GRAPH), cycle(layer.copies), strict=False)]

    def normed(self, index: int) -> torch.Tensor:
        """Return what the gate and the experts of a call get."""
        return torch.nn.functional.rms_norm(self.inputs[index], [self.gain.numel()], self.gain)

    def chosen(self, index: int, gate: Gate) -> torch.Tensor:
        """Return a call's result where the layer chooses."""
        x = self.normed(index)
        logits = gate(x, self.gates[index])
        w13, w2 = self.weights[index]
        return routed_moe(x, logits, self.padding, self.top_k, True, None, w13, w2, self.layer.spec)

    def given(self, index: int, choice: Callable[..., None]) -> torch.Tensor:
        """Return a call's result where vLLM chooses."""
        x = self.normed(index)
        logits = torch.nn.functional.linear(x, self.gates[index])
        router = torch.empty(x.shape[0], self.top_k, dtype=torch.float32, device=x.device)
        ids = torch.empty(router.shape, dtype=torch.int32, device=x.device)
        choice(router, ids, torch.empty_like(ids), logits, True, is_padding=self.padding)
        w13, w2 = self.weights[index]
        return fused_moe(x, router, ids, None, w13, w2, self.layer.spec)

    def error(self, tile: WideTile) -> float:
        """Return how far the logits by a tile are from the library's, relative to those."""
        x = self.normed(0)
        return relative_error(by_tile(x, self.gates[0], tile), torch.nn.functional.linear(x, self.gates[0]))


def measure(layer: Layer, tokens: int, seconds: float) -> dict[str, Any]:
    """Return microseconds of a layer with its gate, by contender and turn, the tile in use, errors of tiles' logits.

    Raises:
        ValueError: logits by a tile are not the library's.
    """
    gated, choice = Gated(layer, tokens), vllm_choice()
    contenders: dict[str, Call] = {} if choice is None else {"router": partial(gated.given, choice=choice)}
    contenders["library"] = partial(gated.chosen, gate=torch.nn.functional.linear)
    errors = {}
    for tile in tiles(tokens, layer.device):
        label = str(tuple(tile))
        contenders[label] = partial(gated.chosen, gate=partial(by_tile, tile=tile))
        errors[label] = gated.error(tile)
        if not errors[label] < MAX_ERROR:
            raise ValueError(f"{tile}: relative error {errors[label]:.3g} of the logits against the library's")
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(TURNS):
        for label, call in contenders.items():
            timing, _ = time_calls([partial(call, index) for index in range(CALLS_IN_GRAPH)], layer.device, seconds)
            times[label].append(timing.median * 1e6)
    shape = layer.shape
    chosen = wide_tile(tokens, shape.experts, shape.hidden, layer.device)
    return {"microseconds": times, "chosen": chosen, "errors": errors}


def format_report(record: dict[str, Any]) -> str:
    """Return the table: vLLM's router, the library's gate, the tile in use and the best one; means of turns."""
    rows = []
    for row in record["rows"]:
        means = {label: sum(turns) / len(turns) for label, turns in row["microseconds"].items()}
        ours = {label: means[label] for label in row["errors"]}
        used = "library" if row["chosen"] is None else str(tuple(row["chosen"]))
        best = min(ours, key=lambda label: ours[label])
        texts = ["" if label not in means else f"{means[label]:.2f}" for label in ("router", "library", used)]
        rows.append([row["model"], str(row["tokens"]), *texts, f"{ours[best]:.2f} {best}"])
    return markdown_table(["model", "tokens", "vLLM's router", "library's gate", "our gate", "best tile"], rows)


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; write JSON and print the table."""
    arguments = point_parser(__doc__, "--models", MODELS, 0.15).parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = ((name, Layer(MODELS[name], device, DTYPE)) for name in arguments.models)
    rows = (
        {"model": name, "tokens": tokens} | measure(layer, tokens, arguments.seconds)
        for name, layer in layers
        for tokens in arguments.tokens
    )
    record = record_rows("gates", arguments.output, device, rows)
    print(format_report(record))


if __name__ == "__main__":
    main()
