"""Calibration in one streamed pass: each layer sees what the quantized layers before it put out.

Two streams of hidden states go through the model side by side, a layer in memory at a time: one through the original
layers, one through the quantized ones. What a layer's matrices read in the second gives the second moments that their
errors are weighed by, and what the layer puts out in the first is what its learned codes are trained on. Streams are
not kept: a conversion that goes on after some layers lets both run through these again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..families.family import Family
from ..nouns import LoadedMatrix, Matrix
from ..source.states import StatesHome
from ..source.streamed_model import StreamedModel
from .activations import refuse_broken
from .input_moments import InputMoments


class SequentialPass:
    """The two streams of a model.

    Args:
        model: the source model.
        family: of the model.
        windows: int64 [W, T].
        batch: windows that run at once.
        full: whether moments count in full, or their diagonals alone.
        home: where the streams lie; by default on the model's device.
    """

    def __init__(
        self,
        model: StreamedModel,
        family: Family,
        windows: torch.Tensor,
        batch: int = 8,
        full: bool = True,
        home: StatesHome | None = None,
    ) -> None:
        self.model, self._family, self._batch, self._full = model, family, batch, full
        self._home = home or StatesHome(model.device)
        self.original = model.begin(windows, self._home)
        self.quantized = self.original

    @torch.no_grad()
    def visit(self, index: int) -> Visit:
        """Load a layer, run it on the original stream, and gather moments on the quantized one.

        Raises:
            ConversionError: the layer is not what transformers needs, or puts out NaN or Inf.
        """
        module, target = self._original(index)
        moments = InputMoments(module, f"{self._family.layer_name(index)}.", self._family, self._full)
        for part in self.quantized.split(self._batch):
            self.model.run(index, module, part)
        moments.close()
        return Visit(self, index, module, target, moments)

    def replay(self, index: int, weights: Iterable[LoadedMatrix]) -> None:
        """Let both streams go through a layer that was quantized before, with the same result to the bit as then.

        Args:
            index: of the layer.
            weights: its quantized ones, float32 [N, K] each, one after the other.

        Raises:
            ConversionError: the layer is not what transformers needs, or puts out NaN or Inf.
        """
        module, target = self._original(index)
        self.leave(index, module, target, weights)

    @torch.no_grad()
    def _original(self, index: int) -> tuple[torch.nn.Module, torch.Tensor]:
        """Return a layer with its original weights, and what it puts out in the original stream, [W, T, H]."""
        module = self.model.layer(index)
        target = self.model.advance(index, module, self.original, self._batch, self._home)
        refuse_broken(self.model, self._family, index, module, self.original, target, quantized=False)
        return module, target

    def parameters(self, index: int, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the parameters of a layer in memory by their names in checkpoints."""
        own = dict(module.named_parameters())
        return {name: own[mine].data for name, mine in self.model.parameters(index, module).items()}

    @torch.no_grad()
    def leave(self, index: int, module: torch.nn.Module, target: torch.Tensor, weights: Iterable[LoadedMatrix]) -> None:
        """Run a layer with its quantized weights on the quantized stream, and free it.

        Args:
            index: of the layer.
            module: the layer, whose matrices are overwritten.
            target: what it put out in the original stream, [W, T, H].
            weights: its quantized ones, float32 [N, K] each, one after the other.

        Raises:
            ConversionError: it puts out NaN or Inf.
        """
        self.original = target  # before there is one more stream: what it was is needed no more
        self.model.fill(self.parameters(index, module), weights)
        after = self.model.advance(index, module, self.quantized, self._batch, self._home)
        refuse_broken(self.model, self._family, index, module, self.quantized, after, quantized=True)
        self.quantized = after
        self.model.drop(module)


class Visit:
    """One layer in memory.

    Attributes:
        module: the layer with its original weights.
        target: what it puts out in the original stream, [W, T, H].
        moments: of its matrices' inputs in the quantized stream.
    """

    def __init__(
        self,
        of: SequentialPass,
        index: int,
        module: torch.nn.Module,
        target: torch.Tensor,
        moments: InputMoments,
    ) -> None:
        self._pass, self.index, self.module, self.target, self.moments = of, index, module, target, moments

    def loaded(self, matrices: Sequence[Matrix]) -> list[LoadedMatrix]:
        """Return matrices with their original weights, views of the layer's parameters, [N, K] in the model's dtype."""
        held = self._pass.parameters(self.index, self.module)
        return [(matrix, self._pass.model.place(f"{matrix.name}.weight", held)[1]) for matrix in matrices]

    def leave(self, weights: Iterable[LoadedMatrix]) -> None:
        """Run the layer with its quantized weights, float32 [N, K] each, on the quantized stream, and free it.

        Raises:
            ConversionError: it puts out NaN or Inf.
        """
        self._pass.leave(self.index, self.module, self.target, weights)
