"""Loads checkpoints with vLLM's loaders and runs none: ``python vllm_loads.py OUT.json FOLDER...``.

For families that vLLM's CPU build cannot run. A checkpoint is loaded whole where vLLM found a tensor for every
parameter that is not quantized, and every piece of every quantized matrix came.
OUT: {folder: number of layers of MiLo's, or the error}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm_runner import environment_of_vllm, hide_amx, run_script


def load(folders: list[Path], place: Path, timeout: float = 600) -> dict[str, Any]:
    """Load checkpoints in a process of its own; return what OUT holds."""
    out = place / "loaded.json"
    run_script([__file__, str(out), *map(str, folders)], place, place / "loads.log", environment_of_vllm(), timeout)
    return json.loads(out.read_text())


def _load(folder: str) -> int:
    """Load a checkpoint; return the number of its layers that are MiLo's, all of which got every piece."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        trust_remote_code=True,
        enforce_eager=True,
        max_model_len=256,
        enable_prefix_caching=False,
        dtype="float32",
        quantization="milo",
        language_model_only=True,
    ).create_engine_config()
    loader, model_config = get_model_loader(config.load_config), config.model_config
    torch.cuda.Event = object  # type: ignore[misc, assignment]  # which attention makes, and CPUs have none of
    with set_current_vllm_config(config), set_default_torch_dtype(model_config.dtype):
        _begin_process()
        model = loader.create_model(vllm_config=config, model_config=model_config)
        loader.load_weights(model, model_config)
        layers = [module for module in model.modules() if _is_milo(module)]
        for layer in layers:
            layer.quant_method.process_weights_after_loading(layer)
    return len(layers)


def _take_dense_attention_for_sparse() -> None:
    """Let models that want sparse attention be built, of which CPUs have none; its parameters are the model's own."""
    from vllm.platforms.cpu import CpuPlatform

    choose: Any = CpuPlatform.get_attn_backend_cls.__func__  # type: ignore[attr-defined]

    def chosen(cls: Any, selected: Any, attn_selector_config: Any, **sizes: Any) -> str:
        return choose(cls, selected, attn_selector_config._replace(use_sparse=False), **sizes)

    CpuPlatform.get_attn_backend_cls = classmethod(chosen)  # type: ignore[assignment, method-assign]


def _is_milo(module: Any) -> bool:
    return type(getattr(module, "quant_method", None)).__module__.startswith("vllm_milo.")


def _begin_process() -> None:
    """Make this process the only one of a model's, once."""
    import torch.distributed as dist
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    if not dist.is_initialized():
        with tempfile.NamedTemporaryFile(delete=False) as file:
            init_distributed_environment(1, 0, f"file://{file.name}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)


def main() -> None:
    """Load the folders named on the command line."""
    results: dict[str, Any] = {}
    hide_amx()
    _take_dense_attention_for_sparse()
    for folder in sys.argv[2:]:
        try:
            results[folder] = _load(folder)
        except Exception as error:  # the test of this checkpoint fails with it; the others are still loaded
            results[folder] = f"{type(error).__name__}: {error}"
            print(folder, results[folder], flush=True)
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
