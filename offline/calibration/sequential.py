"""Calibration in one streamed pass: each layer sees what the quantized layers before it put out.

Two streams of hidden states go through the model side by side, a layer in memory at a time: one through the original
layers, one through the quantized ones. What a layer's matrices read in the second gives the second moments that their
errors are weighed by, and what the layer puts out in the first is what its learned codes are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import ConversionError
from ..nouns import LoadedMatrix, Matrix
from ..source.family import Family
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
    """

    def __init__(
        self, model: StreamedModel, family: Family, windows: torch.Tensor, batch: int = 8, full: bool = True
    ) -> None:
        self.model, self._family, self._batch, self._full = model, family, batch, full
        self.original = model.begin(windows)
        self.quantized = self.original

    def save(self) -> dict[str, torch.Tensor]:
        """Return both streams, [W, T, H] each on the CPU, for :meth:`restore`."""
        return {"original": self.original.cpu(), "quantized": self.quantized.cpu()}

    def restore(self, states: Mapping[str, torch.Tensor]) -> None:
        """Go on after the layer that these streams were saved after, in this process or another.

        Raises:
            ConversionError: they have another shape or dtype than this pass.
        """
        for name, saved in states.items():
            if (saved.shape, saved.dtype) != (self.original.shape, self.original.dtype):
                raise ConversionError(
                    f"the saved {name} states are {saved.dtype} {list(saved.shape)}, but this calibration has "
                    f"{self.original.dtype} {list(self.original.shape)}; start over without --resume"
                )
        self.original, self.quantized = (states[name].to(self.model.device) for name in ("original", "quantized"))

    @torch.no_grad()
    def visit(self, index: int) -> Visit:
        """Load a layer, run it on the original stream, and gather moments on the quantized one.

        Raises:
            ConversionError: the layer is not what transformers needs, or puts out NaN or Inf.
        """
        module = self.model.layer(index)
        target = self.model.advance(index, module, self.original, self._batch)
        refuse_broken(self.model, self._family, index, module, self.original, target, quantized=False)
        moments = InputMoments(module, f"model.layers.{index}.", self._family, self._full)
        for part in self.quantized.split(self._batch):
            self.model.run(index, module, part)
        moments.close()
        return Visit(self, index, module, target, moments)


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
        held = self._held()
        return [(matrix, self._pass.model.place(f"{matrix.name}.weight", held)[1]) for matrix in matrices]

    def _held(self) -> dict[str, torch.Tensor]:
        own = dict(self.module.named_parameters())
        return {name: own[mine].data for name, mine in self._pass.model.parameters(self.index, self.module).items()}

    @torch.no_grad()
    def leave(self, weights: Mapping[Matrix, torch.Tensor]) -> None:
        """Run the layer with its quantized weights, float32 [N, K] each, on the quantized stream, and free it.

        Raises:
            ConversionError: it puts out NaN or Inf.
        """
        model = self._pass.model
        held = self._held()
        for matrix, values in weights.items():
            model.place(f"{matrix.name}.weight", held)[1].copy_(values)
        before = self._pass.quantized
        after = model.advance(self.index, self.module, before, self._pass._batch)
        refuse_broken(model, self._pass._family, self.index, self.module, before, after, quantized=True)
        self._pass.quantized = after
        self._pass.original = self.target
        model.drop(self.module)
