"""Second moments of the inputs of one decoder layer's matrices, gathered while the layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vllm_milo.names import leaf_of

from ..errors import ConversionError
from ..families.family import Family
from ..families.slots import Projections
from ..nouns import Matrix, Moments

MAX_FULL_SIZE = 8192
"""Sides up to this get full second moments, larger ones their diagonal."""
UNSEEN = 1e-12
"""Second moment of what the text never reaches, so that such an expert is still quantized by plain squares."""
PRIOR_TOKENS = 1.0
"""Correlations are shrunk as if so many times K tokens of uncorrelated inputs had been seen beside the real ones."""
MAX_EXPERT_BYTES = 6 * 2**30
"""Above this, the experts of a layer share the moment of their input; each keeps the one of its inner activations."""


class Moment:
    """A running Σ a·aᵀ (or its diagonal) over rows a, with their number."""

    def __init__(self, size: int, full: bool = True) -> None:
        self.full = full and size <= MAX_FULL_SIZE
        self.rows = 0
        self.total: torch.Tensor | None = None
        self.size = size

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [T, size]."""
        rows = rows.detach().reshape(-1, self.size).float()
        update = rows.mT @ rows if self.full else rows.square().sum(0)
        self.total = update if self.total is None else self.total.add_(update)
        self.rows += rows.shape[0]

    def shrunk(self, device: torch.device) -> torch.Tensor:
        """Return Σ a·aᵀ with correlations shrunk, [size, size] or [size]; the identity's share where none was seen."""
        if self.total is None:
            unseen = torch.full((self.size,), UNSEEN, device=device)
            return unseen.diag_embed() if self.full else unseen
        total = self.total.to(device)
        if not self.full:
            return total
        keep = self.rows / (self.rows + PRIOR_TOKENS * self.size)
        return total * keep + torch.diag_embed(total.diagonal()) * (1 - keep)


class InputMoments:
    """The moments of one layer's matrices.

    Inputs of routed experts count with the square of their router weight: that is how their errors count in the sum.

    Args:
        module: the decoder layer; hooked until :meth:`close`.
        name: of the layer, with a dot at the end.
        family: of the model.
        full: whether moments count in full, or their diagonals alone.
    """

    def __init__(self, module: torch.nn.Module, name: str, family: Family, full: bool = True) -> None:
        self._family = family
        self.by_name: dict[str, Moment] = {}
        self.tokens: dict[str, int] = {}
        self._stacked: dict[tuple[int, ...], Moments] = {}
        self.full = full
        self._last: tuple[torch.Tensor | None, Moment | None] = (None, None)
        self._undo: list[Callable[[], None]] = []
        self._diagonals: list[_ExpertDiagonals] = []
        for inner, part in module.named_modules():
            checkpoint = family.checkpoint_name(name + inner)
            if isinstance(part, torch.nn.Linear) and family.kind(checkpoint) is not None:
                self._undo.append(part.register_forward_pre_hook(partial(self._see, checkpoint)).remove)
            elif leaf_of(inner) == "experts" and (hasattr(part, "gate_up_proj") or hasattr(part, "up_proj")):
                self._undo.append(part.register_forward_pre_hook(self._experts(checkpoint, part)).remove)

    def _experts(self, name: str, module: Any) -> Callable[..., None]:
        """Return what watches the routed experts of a layer."""
        if self.full:
            return _Experts(self, name, module)
        self._diagonals.append(_ExpertDiagonals(name, self._family.projections, module))
        return self._diagonals[-1]

    def close(self) -> None:
        """Stop watching."""
        for undo in self._undo:
            undo()
        self._last = (None, None)
        for experts in self._diagonals:
            for matrix, moment in experts.moments():
                self.by_name[matrix], self.tokens[matrix] = moment, moment.rows

    def _see(self, name: str, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        """Add the inputs of a linear layer, which the layer before it may have shared."""
        known, moment = self._last
        if known is not args[0] or moment is None:
            moment = self.by_name.get(name) or Moment(args[0].shape[-1], self.full)
            moment.add(args[0])
            self._last = (args[0], moment)
        self.by_name[name] = moment

    def group(self, matrix: Matrix) -> str:
        """Return what matrices of one batch have in common: the roles of routed experts stay apart."""
        return matrix.name.rpartition(".")[2] if matrix.experts is not None else ""

    def numbers(self, matrix: Matrix) -> int:
        """Return the numbers in the moment of a matrix."""
        moment = self.by_name.get(matrix.name)
        return 0 if moment is None else moment.size**2 if moment.full else moment.size

    def of(self, matrices: Sequence[Matrix], device: torch.device) -> Moments:
        """Return the moments of matrices of one shape, each of mean diagonal 1; one for all where they share it.

        Raises:
            ConversionError: the model never ran one of them, or its inputs are not finite.
        """
        own = []
        for matrix in matrices:
            if matrix.name not in self.by_name:
                raise ConversionError(f"{matrix.name}: the calibration found no such module in the model")
            own.append(self.by_name[matrix.name])
        if len({id(moment) for moment in own}) == 1:
            own = own[:1]
        key = tuple(id(moment) for moment in own)
        if key not in self._stacked:
            found = [self._unit(matrix.name, moment, device) for matrix, moment in zip(matrices, own, strict=False)]
            self._stacked[key] = Moments(torch.stack(found))
        return self._stacked[key]

    def _unit(self, name: str, moment: Moment, device: torch.device) -> torch.Tensor:
        """Return a moment, or its diagonal, of mean diagonal 1."""
        values = moment.shrunk(device)
        diagonal = values.diagonal() if values.dim() == 2 else values
        if not torch.isfinite(diagonal).all():
            raise ConversionError(
                f"{name}: its inputs on the calibration text hold NaN or Inf; the source model is broken, or needs "
                f"another dtype; use --calibration none"
            )
        mean = diagonal.mean().clamp(min=1e-30)
        return (values if self.full else diagonal) / mean


class _Experts:
    """Adds the inputs and inner activations of the routed experts of a layer to full moments, one expert at a time."""

    def __init__(self, into: InputMoments, name: str, module: Any) -> None:
        self._into, self._name = into, name
        experts, hidden, inner = module.down_proj.shape
        shared = experts * hidden**2 * 4 > MAX_EXPERT_BYTES
        common = Moment(hidden)
        self._moments = [(common if shared else Moment(hidden), Moment(inner)) for _ in range(experts)]
        *read, down = into._family.projections.present
        for expert, (before, middle) in enumerate(self._moments):
            for leaf, moment in (*((leaf, before) for leaf in read), (down, middle)):
                into.by_name[f"{name}.{expert}.{leaf}"] = moment
                into.tokens[f"{name}.{expert}.{leaf}"] = 0

    def __call__(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        states, index, weights = args
        for expert in index.unique().tolist():
            tokens, place = torch.where(index == expert)
            rows, weight = states[tokens], weights[tokens, place, None]
            before, middle = self._moments[expert]
            before.add(rows * weight)
            middle.add(_inner(module, partial(_times_expert, rows, expert)) * weight)
            for leaf in self._into._family.projections.present:
                self._into.tokens[f"{self._name}.{expert}.{leaf}"] += len(rows)


class _ExpertDiagonals:
    """Adds the squares of the inputs and inner activations of the routed experts of a layer, all experts at once."""

    def __init__(self, name: str, projections: Projections, module: Any) -> None:
        self._name, self._projections = name, projections.present
        experts, hidden, inner = module.down_proj.shape
        zeros = module.down_proj.new_zeros
        self._before, self._middle = (zeros(experts, size, dtype=torch.float32) for size in (hidden, inner))
        self._rows = zeros(experts, dtype=torch.int64)

    def __call__(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        states, index, weights = args
        expert, order = index.flatten().sort(stable=True)
        number = torch.nn.functional.one_hot(expert, len(self._rows)).sum(0)
        rows, weight = states[order // index.shape[-1]], weights.flatten()[order, None]
        inner = _inner(module, lambda matrices: grouped_linear(rows, matrices, number))
        for sums, inputs in ((self._before, rows), (self._middle, inner)):
            squares = (inputs * weight).float().square()
            # expert by expert and row by row: atomic additions would differ from run to run
            sums += torch.segment_reduce(squares, "sum", lengths=number, axis=0, unsafe=True)
        self._rows += number

    def moments(self) -> Iterator[tuple[str, Moment]]:
        """Yield the moments by the names of the experts' matrices."""
        *read, down = self._projections
        for expert, rows in enumerate(self._rows.tolist()):
            for sums, leaves in ((self._before, read), (self._middle, (down,))):
                moment = Moment(sums.shape[-1], full=False)
                moment.rows, moment.total = rows, sums[expert] if rows else None
                yield from ((f"{self._name}.{expert}.{leaf}", moment) for leaf in leaves)


def _inner(module: Any, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the inner activations of a module of experts: act(gate)·up, or act(up) where it has no gate.

    Args:
        module: of transformers.
        multiply: returns the products of the experts' inputs with a parameter of the module, [.., N] of [E, N, K].
    """
    if hasattr(module, "gate_up_proj"):
        gate, up = multiply(module.gate_up_proj).chunk(2, dim=-1)
        return module.act_fn(gate) * up
    return module.act_fn(multiply(module.up_proj))


def _times_expert(rows: torch.Tensor, expert: int, matrices: torch.Tensor) -> torch.Tensor:
    """Return W·x of rows x [S, K] by the matrix of one expert, of all [E, N, K]."""
    return torch.nn.functional.linear(rows, matrices[expert])


def grouped_linear(rows: torch.Tensor, weights: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Return W·x of rows x that are sorted by expert, each by its own expert's matrix.

    Args:
        rows: [S, K].
        weights: [E, N, K].
        number: of rows of each expert, int64 [E]; together S.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weights.mT, offs=number.cumsum(0).int())
    parts = zip(rows.split(number.tolist()), weights, strict=True)
    return torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts])
