"""A process that compiles jobs: they come through standard input, and a reply to each leaves by standard output.

    python -m vllm_milo.kernels.compiling.process CAPABILITY

It ends with its input, so also with the process that started it, however that ended.
"""

from __future__ import annotations

import os
import pickle
import sys

from .jobs import use_target

NICE = 10
"""How far this process stands back where cores are few: the one that reads weights goes first."""


def main(capability: int) -> None:
    """Compile jobs for a compute capability until there are no more.

    A job comes pickled within a pickle, so that one that cannot be read is answered too.
    """
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a compiler prints must not come between replies
    os.nice(NICE)
    use_target(capability)
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            replies.write(pickle.dumps(_failure(job)))
        except BrokenPipeError:  # nobody wants it any more
            return


def _failure(job: bytes) -> str | None:
    """Compile a job; return what went wrong, if anything did."""
    try:
        pickle.loads(job).compile()
    except Exception as error:  # of any kind: who sent the job compiles it, and raises its own
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    main(int(sys.argv[1]))
