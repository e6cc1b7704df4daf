"""``python -m vllm_milo.offline.cli``: the command ``milo`` where no script is installed."""

import sys

from .command import main

sys.exit(main())
