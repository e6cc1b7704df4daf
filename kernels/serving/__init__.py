"""The Triton kernels that serve a layer. Imported only where Triton is used.

A layer is launched by :mod:`.fused_moe` or :mod:`.linear`, with tiles that :mod:`.dispatch` or, without a
tuned file, :mod:`.gemm.heuristic` chooses, and weights in the layout of :mod:`.layout`. Its launches, in their order:

- :mod:`.prepare`: the sort of :mod:`.routing`, and what the GEMM wants of its input.
- :mod:`.projection`: the compensators' down-projection V·x.
- :mod:`.gemm`: the GEMM on 3-bit weights, with the compensators' up-projection.
- :mod:`.activation` between the two GEMMs of experts, and :mod:`.reduce` at the end.

:mod:`.blocks` is what their kernels read of the sorted pairs. :mod:`.protocol` says who waits for whom.
"""
