"""One Hugging Face model in memory whose weights are swapped for those of quantized checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_milo.offline.checkpoint.dequantize import DequantizedTensors
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.nouns import Kind, Matrix
from vllm_milo.offline.source.reader import ModelReader
from vllm_milo.validation import validate_checkpoint


class QuantizedModel:
    """A model in float32, with a 2-D view of every matrix that is quantized, by its name in the checkpoint.

    Attributes:
        model: the causal LM of transformers.
        matrices: what is quantized, by name.
        views: the weights in use, float32 [N, K], parts of the model's parameters.
        source: the unquantized weights.
        experts: the modules of routed experts, by their name in the checkpoint.
    """

    def __init__(self, folder: Path, device: str) -> None:
        reader = ModelReader(folder)
        self.family = reader.family
        self.matrices: dict[str, Matrix] = {matrix.name: matrix for matrix in reader.matrices}
        self.model: Any = load_model(folder, torch.float32, device)
        self.experts: dict[str, Any] = {}
        self.linears: dict[str, Any] = {}
        self.views = self._find_views()
        missing = self.matrices.keys() - self.views.keys()
        if missing:
            raise ValueError(f"{folder}: no weights in memory for {min(missing)}; transformers lays them out otherwise")
        self.source = {name: view.clone() for name, view in self.views.items()}

    def kind(self, name: str) -> str:
        """Return the kind of a matrix; routed experts by projection."""
        matrix = self.matrices[name]
        if matrix.kind is not Kind.ROUTED_EXPERT:
            return str(matrix.kind)
        down = name.rpartition(".")[2] == self.family.projections.down
        return "routed_down" if down else "routed_gate_up"

    def load(self, checkpoint: Path) -> None:
        """Put the weights of a MiLo checkpoint of this model in place."""
        found = 0
        for tensor, values in DequantizedTensors(checkpoint, validate_checkpoint(checkpoint), torch.float32).load():
            name = tensor.removesuffix(".weight")
            if name in self.views:
                self.views[name].copy_(values)
                found += 1
        if found != len(self.views):
            raise ValueError(f"{checkpoint}: holds {found} of the model's {len(self.views)} matrices")

    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put some matrices in place."""
        for name, values in weights.items():
            self.views[name].copy_(values)

    def restore(self) -> None:
        """Put the unquantized weights back."""
        self.put(self.source)

    @torch.inference_mode()
    def errors(self, moments: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
        """Return relative errors by kind of matrix, means over matrices.

        ``weight`` is ‖W - Ŵ‖/‖W‖, ``output`` ‖X(W - Ŵ)ᵀ‖/‖XWᵀ‖ with the inputs X of the moments XᵀX; matrices
        that saw no input do not count there.
        """
        sums: dict[str, dict[str, list[float]]] = {"weight": defaultdict(list), "output": defaultdict(list)}
        for name, view in self.views.items():
            kind, source = self.kind(name), self.source[name]
            difference = source - view
            sums["weight"][kind].append(float(difference.norm() / source.norm()))
            moment = moments.get(name)
            if moment is not None and float(moment.trace()) > 0:
                lost, whole = (float(((part @ moment) * part).sum()) for part in (difference, source))
                sums["output"][kind].append((max(lost, 0.0) / whole) ** 0.5)
        return {
            what: {kind: sum(values) / len(values) for kind, values in sorted(table.items())}
            for what, table in sums.items()
        }

    def _find_views(self) -> dict[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = {}
        gate, up, down = self.family.projections
        for module_name, module in self.model.named_modules():
            name = self.family.checkpoint_name(module_name)
            if isinstance(module, torch.nn.Linear) and name in self.matrices:
                self.linears[name] = module
                views[name] = module.weight.data
            elif name.endswith(".experts") and hasattr(module, "gate_up_proj"):
                self.experts[name] = module
                size = module.down_proj.shape[-1]
                for index in range(module.down_proj.shape[0]):
                    views[f"{name}.{index}.{gate}"] = module.gate_up_proj.data[index, :size]
                    views[f"{name}.{index}.{up}"] = module.gate_up_proj.data[index, size:]
                    views[f"{name}.{index}.{down}"] = module.down_proj.data[index]
        return {name: view for name, view in views.items() if name in self.matrices}
