"""Gives vLLM's runner of CPUs the buffers of later pipeline stages: imported by its workers, as their extension.

vLLM (0.32) makes them when it profiles a model, which its CPU build does only where it compiles.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_original = GPUModelRunner.sync_and_gather_intermediate_tensors


def _with_buffers(self: Any, *arguments: Any, **options: Any) -> Any:
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return _original(self, *arguments, **options)


GPUModelRunner.sync_and_gather_intermediate_tensors = _with_buffers


class Extension:
    """Of a worker; what counts is that vLLM imports this module for it."""
