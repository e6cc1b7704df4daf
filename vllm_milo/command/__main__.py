"""``python -m vllm_milo.command``: the command ``milo`` where no script is installed."""

import sys

from vllm_milo.command import main

if __name__ == "__main__":  # processes that compile import this module too
    sys.exit(main())
