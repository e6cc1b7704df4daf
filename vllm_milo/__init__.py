"""vLLM plugin that serves MiLo checkpoints: 3-bit MoE weights plus low-rank compensators.

vLLM finds :func:`register` through the entry point ``vllm.general_plugins`` and calls it in every process. transformers
loads MiLo checkpoints once this package is imported.
"""

from vllm_milo.huggingface.on_import import register_in_transformers
from vllm_milo.version import __version__

__all__ = ["__version__", "register"]


def register() -> None:
    """Make ``--quantization milo`` known to vLLM. Idempotent; imports vLLM only when called."""
    from vllm_milo.config import MiLoConfig, register_config

    register_config(MiLoConfig)


register_in_transformers()
