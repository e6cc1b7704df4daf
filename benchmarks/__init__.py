"""What the README's numbers come from; run from the root of the repository as ``python -m benchmarks.FOLDER.MODULE``.

The folders are named for what they measure: ``kernels``, ``offline`` (the converter), ``serving`` in vLLM, and the
``accuracy`` of quantized models. ``--help`` of a module says what it measures and how.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the root first on the path, where kernels/ hides Hugging Face's package of that name, and vllm_milo/
# an installed copy; last, it hides nothing
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != ROOT), str(ROOT)]
