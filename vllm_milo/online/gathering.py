"""16-bit matrices on their way in, which are quantized a few decoder layers at once, as the converter does.

A GPU works as long on a few small matrices as on many, so each by itself would take a load many times as long.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, nullcontext
from typing import NamedTuple

import torch

from vllm_milo.checkpoint import CheckpointError
from vllm_milo.offline.batches import Rule, gather_layers, plan_batches
from vllm_milo.offline.calibration import memory
from vllm_milo.offline.calibration.layer_moments import NoMoments
from vllm_milo.offline.checkpoint.matrices import tensors_on_host
from vllm_milo.offline.nouns import Kind, Matrix, Recipe
from vllm_milo.offline.planning.pieces import solver_weights
from vllm_milo.offline.source.layers import natural_key
from vllm_milo.offline.spread.ahead import ahead
from vllm_milo.offline.spread.devices import Devices
from vllm_milo.offline.spread.job import Done, Job, stacked
from vllm_milo.online.pinned import pins, release

logger = logging.getLogger("vllm.milo")

LINE = "MiLo quantized %d matrices in %d batches: %.2f s of solving, %.2f s of waiting for weights"
_NUMBERED = re.compile(r".*?\.\d+(?=\.)")
"""The beginning of a tensor's name that is its decoder layer's."""

Deliver = Callable[[Mapping[str, torch.Tensor]], None]
"""Takes the tensors that a checkpoint would hold of a matrix, on the CPU, by the last part of their names."""


class _Taken(NamedTuple):
    """A matrix that has arrived, [N, K] in a 16-bit dtype or float32, and who wants the result."""

    values: torch.Tensor
    deliver: Deliver


class _Layer(NamedTuple):
    """Matrices of a decoder layer that this process holds: numbers of weights by tensor name."""

    sizes: dict[str, int]

    @property
    def weights(self) -> int:
        """Return the number of weights of all."""
        return sum(self.sizes.values())


class _Step(NamedTuple):
    """Matrices that are quantized together: names of those still to come, and those that are there."""

    missing: set[str]
    taken: dict[str, _Taken]


class Gathering:
    """The matrices of a model that is quantized while it is loaded.

    Layers say first what they expect. Steps are of whole decoder layers, the converter's own in one process; at most
    what one is made of lies in memory beside what is quantized, if tensors come about in the order of layers. Nothing
    is computed before a step is complete.

    Args:
        recipe: of the solver.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._announced: dict[str, _Layer] = {}
        self._ranks: dict[str, int] = {}
        self._steps: dict[str, _Step] = {}
        self._rule: Rule | None = None
        self._begin_account()

    def expect(self, name: str, rank: int, weights: int) -> None:
        """Announce a matrix that this process will take.

        Args:
            name: of its tensor, as the checkpoint has it.
            rank: of its compensator.
            weights: how many it has.
        """
        layer = _NUMBERED.match(name)
        self._announced.setdefault(layer[0] if layer else name, _Layer({})).sizes[name] = weights
        self._ranks[name] = rank

    def take(self, name: str, values: torch.Tensor, device: torch.device, deliver: Deliver) -> None:
        """Take a matrix; the last one of a step has all of the step quantized and delivered.

        Args:
            name: as it was announced.
            values: [N, K] in a 16-bit dtype or float32; not to be changed.
            device: where the solver runs.
            deliver: takes the result.

        Raises:
            CheckpointError: the matrix was not announced, or came before; or memory ran out for its step.
            ConversionError: a matrix of the step holds NaN or Inf or cannot be quantized; it is named.
        """
        if self._announced:
            self._plan(device)
        step = self._steps.get(name)
        if step is None or name not in step.missing:
            raise CheckpointError(
                f"{name}: appears twice, or in no layer of the model; convert it first: milo quantize MODEL -o OUT"
            )
        step.missing.remove(name)
        step.taken[name] = _Taken(values, deliver)
        if step.missing:
            return
        try:
            self._quantize(step.taken, device)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            weights, first = sum(held.values.numel() for held in step.taken.values()), min(step.taken, key=natural_key)
            raise CheckpointError(
                f"{first}: out of memory on {device}, where {len(step.taken)} matrices of {weights} weights are "
                f"quantized; free some, or convert the model first: milo quantize MODEL -o OUT --device cpu"
            ) from error
        for done in step.taken:
            del self._steps[done]
        if not self._steps:
            release()
            logger.info(LINE, self._matrices, self._batches, self._solving, self._waiting)
            self._begin_account()

    def refuse_incomplete(self) -> None:
        """Refuse a model some of whose matrices never arrived, once all of its files were read.

        Raises:
            CheckpointError: names one of them.
        """
        lacking = sorted(
            {name for step in self._steps.values() if step.taken for name in step.missing}, key=natural_key
        )
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise CheckpointError(f"{lacking[0]}{more} never arrived; are the model's files complete?")

    def _begin_account(self) -> None:
        self._matrices, self._batches, self._solving, self._waiting = 0, 0, 0.0, 0.0

    def _plan(self, device: torch.device) -> None:
        """Put what was announced into steps."""
        if self._rule is None:  # once, by the memory that the model's parameters have left
            self._rule = Rule(solver_weights([device], None))
        for layers in gather_layers(self._announced.values(), device, self._rule.elements):
            names = {name for layer in layers for name in layer.sizes}
            self._steps |= dict.fromkeys(names, _Step(names, {}))
        self._announced = {}

    def _quantize(self, taken: Mapping[str, _Taken], device: torch.device) -> None:
        """Quantize a step; the next batch is solved in a thread while what came of one goes to the layers."""
        with Devices([device]) as devices, closing(ahead(self._solved(devices, taken))) as results:
            for done in results:
                self._batches += 1
                self._matrices += len(done.solved)
                self._solving += done.spent.solving
                found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
                for name, tensor in tensors_on_host(done.solved).items():
                    matrix, _, leaf = name.rpartition(".")
                    found[matrix][leaf] = tensor
                for matrix, tensors in found.items():
                    taken[matrix].deliver(tensors)
            self._waiting += devices.waited

    def _solved(self, devices: Devices, taken: Mapping[str, _Taken]) -> Generator[Done, None, None]:
        """Yield what comes of a step's batches; a thread's current GPU is its own."""
        device = devices.first
        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with here, closing(devices.solve(self._jobs(taken, pins(device)), reading=True)) as results:
            yield from results

    def _jobs(self, taken: Mapping[str, _Taken], pinned: bool) -> Iterator[Job]:
        """Yield the batches of a step, whose weights are read from files in memory as each is wanted."""
        assert self._rule is not None
        matrices = [Matrix(name, Kind.DENSE_FFN, *taken[name].values.shape) for name in sorted(taken, key=natural_key)]
        moments = NoMoments()
        for batch in plan_batches(matrices, moments, self._ranks, self._rule):
            names = [matrix.name for matrix in batch]
            weights = stacked([taken[name].values for name in names], pinned)
            assert isinstance(weights, torch.Tensor)  # as all that vLLM hands over
            ranks = [self._ranks[name] for name in names]
            yield Job(batch, weights, moments.of(batch, weights.device), ranks, self._recipe, weights.dtype, names)
