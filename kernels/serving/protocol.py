"""How the launches of a layer follow each other, and the programs of one launch: the one place that says it.

Launches that start early
    With few tokens a launch is programmatic (PDL): its programs may start while the launch before still runs. Two
    instructions order them. ``gdc_wait`` waits until the launch before has ended and all that it wrote is visible.
    ``gdc_launch_dependents`` lets the launch after start, once every program of this launch has said so or ended. It
    promises nothing about memory.

Rules
    1. Every program of a launch waits before it writes anything. Memory that a layer has freed is used again, and
       launches before may still read it.
    2. Every program waits before it reads what the launch before writes.
    3. In every launch at least one program waits before it ends, also if it has no work. So a launch that has ended
       implies that all launches before it have: to wait for one is to wait for all.
    4. A program lets the launch after start only after its own wait.

What the GEMM reads before its wait
    All kernels wait first, but for a GEMM that adds compensators: it waits after its loop over K. Until then it reads
    weights, which no launch writes, and what launches before V·x wrote: x in any order, its sums, the sorted pairs,
    or a single token's ids.
    That is safe by rule 4. A program of the GEMM can run only once every program of V·x has waited, which is when all
    launches before V·x had ended and what they wrote was visible. This assumes that what was visible to the programs of
    V·x is visible to a grid that starts after it, as CUDA's memory model gives: it is performed at the scope of the
    GPU, and a grid starts with empty caches of its multiprocessors.
    Of the GEMM's programs whose block is not in use only the first one waits, for rule 3. The others return at once, so
    that they do not hold the places of tiles.

When the launch after may start
    Right after the wait, but for a GEMM: its programs say so after their loop over K. Sooner, programs of the launch
    after would take the places of this launch's own tiles.

Programs of one V·x that add their parts (``FINISH``)
    Each program (a) stores its part, (b) joins its threads by a barrier, since one thread counts for all of them,
    (c) adds 1 to the counter with acquire and release at the scope of the GPU, and (d), if it was the last, loads all
    parts from L2 (``.cg``), since the cache of its multiprocessor may hold what was there before, and stores the sum.
    The counters are 0 by then: the layer's first launch, :mod:`.prepare`, has set them, each for one use.

:data:`STEPS` says it for each kernel; the tests hold the compiled kernels to it.
"""

from __future__ import annotations

from typing import NamedTuple

START = "start"
"""A kernel waits before it reads or writes anything."""
LATE = "late"
"""A kernel waits before it reads what ``needs`` names and before it writes anything."""


class Step(NamedTuple):
    """What one kernel does in the order of a layer's launches.

    Attributes:
        kernel: the function's name.
        writes: what launches after it read.
        waits: :data:`START` or :data:`LATE`.
        triggers: when the launch after may start.
        needs: the pointers whose memory the launch before writes, where the kernel waits late.
    """

    kernel: str
    writes: str
    waits: str
    triggers: str
    needs: tuple[str, ...] = ()


AT_ONCE = "right after the wait"
AFTER_LOOP = "after the loop over K, which is after the wait too"

CHOOSE = Step("_choose_kernel", "the experts of tokens, and their weights", START, AT_ONCE)
PREPARE = Step(
    "_prepare_kernel",
    "x in other orders, its sums, the sorted pairs, zeros in counters; ids and weights that it chose",
    START,
    AT_ONCE,
)
PROJECT = Step("project_kernel", "V·x, or its parts", START, AT_ONCE)
GEMM = Step("gemm_kernel", "outputs, or their parts over K", LATE, AFTER_LOOP, needs=("down",))
GEMM_ALONE = Step("gemm_kernel", "likewise, without V·x before it", START, AFTER_LOOP)
ACTIVATE = Step("_activation_kernel", "the second GEMM's input in two orders, its sums", START, AT_ONCE)
WEIGHTED_SUM = Step("_weighted_sum_kernel", "the result of a MoE layer", START, AT_ONCE)
SUM_SPLITS = Step("_sum_splits_kernel", "the result of a dense layer whose GEMM splits K", START, AT_ONCE)
WIDE = Step("_wide_kernel", "the result of a dense layer in 16 bits, or a router's logits", START, AT_ONCE)
EXPAND = Step("_expand_kernel", "weights in 16 bits", START, AT_ONCE)

STEPS = (CHOOSE, PREPARE, PROJECT, GEMM, GEMM_ALONE, ACTIVATE, WEIGHTED_SUM, SUM_SPLITS, WIDE, EXPAND)
"""In the order of launches. A MoE layer that has its router's logits begins with ``CHOOSE`` if not ``PREPARE`` does it,
and goes from ``ACTIVATE`` (which a GEMM may do itself) back to ``PROJECT``. A dense layer in 16 bits is ``WIDE`` alone.
With very many tokens ``EXPAND`` comes alone before a library's GEMM: neither starts early, so each waits for all."""


def find_step(kernel: str, has_down: bool) -> Step:
    """Return the step of a kernel by its name; a GEMM's depends on whether V·x comes before it."""
    if kernel == GEMM.kernel:
        return GEMM if has_down else GEMM_ALONE
    return next(step for step in STEPS if step.kernel == kernel)
