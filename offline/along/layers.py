"""Conversion along a calibration text: layer after layer, then, where asked for, all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch

from ..batches import plan_batches
from ..bench import Bench
from ..calibration.sequential import SequentialPass, Visit
from ..calibration.weights import refuse_broken_layer, refuse_broken_weights
from ..checkpoint.matrices import Result
from ..conversion import Conversion, Text
from ..learn.end_to_end import tune
from ..learn.layer import ALONE, learn_layer
from ..nouns import Matrix, Recipe
from ..progress import doing, progress_bar
from ..ranks.budget import stored_bits
from ..served.target import find_target
from ..source.layers import Layer, layer_index
from ..source.streamed_model import StreamedModel, place_tensor, reader_tensors, use_grouped_experts
from ..source.whole_model import load_source_model
from ..spread.job import Job
from ..steps import Layers, Start
from .need import NeedMeter

FULL_MOMENTS_BELOW = 100
"""Steps of learning below which the solver gets full second moments of the inputs. Above, it makes no difference where
learning begins: on a real model of 0.5 B parameters, KL 0.078 from diagonals and 0.080 from full moments (200 steps,
2026-11-27), and diagonals need no factorizations."""


def learn_along(
    bench: Bench,
    plan: Sequence[Layer],
    ranks: Mapping[str, int],
    conversion: Conversion,
    text: Text,
    start: Start,
) -> Iterator[Layers]:
    """Quantize layer after layer on what the quantized layers before it put out, and learn the codes of each.

    The text goes through the model on the first device, which also measures needs and learns. What is spread is solving
    and, where it does not fit there, the state that experts are trained by.
    """
    reader, device, report, recipe = bench.reader, bench.device, bench.report, conversion.recipe
    left = plan[start.layers :]
    if all(layer_index(layer.name) is None for layer in left):
        yield from (iter([(layer, ())]) for layer in left)  # no hidden states are needed any more
        return
    meter = _meter(bench, plan, ranks, conversion, text)
    dtype = reader.dtype if device.type == "cuda" else torch.float32
    tensors = reader_tensors(partial(reader.load, device=device), reader.tensors)
    model = StreamedModel(reader.folder, reader.family, tensors, device, dtype)
    full = text.learn.steps < FULL_MOMENTS_BELOW
    stream = SequentialPass(model, reader.family, text.windows, text.learn.batch, full, bench.states_home)
    if start.layers:
        _replay(stream, bench, plan[: start.layers], start.finished)
    elif not reader.shards.streamed:
        refuse_broken_weights(reader, device, bench.progress)
    home = device if bench.spread == ALONE else torch.device("cpu")
    for layer in progress_bar(left, "quantize", bench.progress, sizes=[layer.weights for layer in left]):
        index = layer_index(layer.name)
        if index is None:
            yield iter([(layer, ())])
            continue
        if reader.shards.streamed:
            refuse_broken_layer(reader, layer, device)
        doing("run the original")
        visit = stream.visit(index)
        matrices = [source.matrix for source in layer.matrices]
        own = {matrix.name: ranks[matrix.name] for matrix in matrices}
        if meter is not None:
            doing("measure needs")
            own, needs = meter.share(stream, visit, matrices, own)
            report.note_needs(layer.name, needs)
        with closing(bench.devices.solve(_jobs(bench, visit, matrices, own, recipe))) as done:
            solved = {matrix: one.to(home) for matrix, one in bench.noted(done)}
        report.note_tokens(solved, visit.moments.tokens)
        if solved and text.learn.steps:
            states = (stream.quantized, visit.target)
            tokens = visit.moments.tokens
            what = (index, visit.module, solved, *states, tokens, recipe.factor_bits)
            solved, said = learn_layer(model, *what, text.learn, bench.spread)
            report.layers[layer.name] = said._asdict()
        doing("run quantized")
        visit.leave((matrix, one.to(device).dequantize()) for matrix, one in solved.items())
        yield iter([(layer, solved.items())])


def _meter(
    bench: Bench, plan: Sequence[Layer], ranks: Mapping[str, int], conversion: Conversion, text: Text
) -> NeedMeter | None:
    """Return what measures how ranks are shared, where they are."""
    if not conversion.measures_ranks or conversion.budget_bits is None:
        return None
    matrices = [source.matrix for layer in plan for source in layer.matrices]
    spare = conversion.budget_bits - stored_bits(matrices, ranks, conversion.recipe)
    target = find_target(conversion.serving_share, bench.reader.config)
    return NeedMeter(conversion.recipe, bench.reader.dtype, text.learn.batch, max(0.0, spare), target)


def _jobs(
    bench: Bench, visit: Visit, matrices: Sequence[Matrix], ranks: Mapping[str, int], recipe: Recipe
) -> Iterator[Job]:
    """Yield the batches of a layer that is in memory, with what errors in them cost."""
    held = dict(visit.loaded(matrices))
    for batch in plan_batches(held, visit.moments, ranks, bench.rule(recipe)):
        weights = torch.stack([held[matrix] for matrix in batch])
        moments = visit.moments.of(batch, weights.device)
        yield Job(batch, weights, moments, [ranks[matrix.name] for matrix in batch], recipe, bench.reader.dtype)
        del weights


def _replay(stream: SequentialPass, bench: Bench, plan: Sequence[Layer], finished: Layers) -> None:
    """Let both streams go through layers that were quantized before; their weights were looked at then."""
    sizes = [layer.weights for layer in plan]
    for layer, (_, solved) in zip(progress_bar(plan, "replay", bench.progress, sizes=sizes), finished, strict=True):
        index = layer_index(layer.name)
        if index is not None:
            stream.replay(index, ((matrix, one.to(stream.model.device).dequantize()) for matrix, one in solved))
        bench.reader.shards.used([layer.name])


def tune_together(
    bench: Bench, layers: Sequence[tuple[Layer, Iterable[tuple[Matrix, Result]]]], recipe: Recipe, text: Text
) -> Layers:
    """Train all layers together on the original's predictions."""
    assert text.tune is not None
    reader = bench.reader
    model, original = (
        load_source_model(reader.folder, reader.dtype, str(bench.device)).requires_grad_(False) for _ in "ab"
    )
    for one in (model, original):
        use_grouped_experts(one)
    place = partial(place_tensor, reader.family)
    solved = {matrix: one.to(bench.device) for _, held in layers for matrix, one in held}
    what = (model, original, place, reader.family, solved, text.windows)
    trained, said = tune(*what, recipe.factor_bits, text.tune, bench.progress)
    bench.report.tuning = {"first_kl": said.first, "last_kl": said.last}
    for layer, held in layers:
        yield layer, [(matrix, trained[matrix]) for matrix, _ in held]
