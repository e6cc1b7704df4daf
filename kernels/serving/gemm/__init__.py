"""The GEMM on 3-bit weights, grouped by expert or dense, with the compensators' up-projection in its epilogue.

From outside to inside: :mod:`.launcher` launches :mod:`.kernel`, with the tile of :mod:`.config`, which
:mod:`.heuristic` chooses where no file does, and what :mod:`.arguments` describes. A program takes one :mod:`.tile`:
the loop over K of :mod:`.products` on the operands of :mod:`.dequant`, then the :mod:`.up_projection` with U of
:mod:`.up_factor`. :mod:`.proved` names the versions of Triton whose machine code was searched for a bug.
"""
